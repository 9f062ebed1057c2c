"""The small mixture of experts that comes with the package, and its held-out text. Imports no JAX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

REFERENCE = "specmd-reference"
"""What names it wherever the folder of a checkpoint is asked for."""
HELD_OUT = "held_out.npz"


def reference_folder() -> Path:
    """Gives the checkpoint's folder: config.json, safetensors at few bits, tokenizer.json, README.md."""
    return Path(__file__).parent / "moe" / "data" / REFERENCE


def held_out_windows() -> dict[str, npt.NDArray[np.uint16]]:
    """Gives windows [8, 513] of token ids from held-out text, by domain, and ``bytes_per_token`` [5] of the domains."""
    with np.load(reference_folder() / HELD_OUT, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}
