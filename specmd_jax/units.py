"""Units for what people read and write; the code itself counts in bytes."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GB = 1e9
