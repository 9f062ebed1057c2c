"""The table of foreign trace formats: one function per format, and a line here adds it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from specmd_jax.errors import SpecmdError, find
from specmd_jax.trace.importers.bigmoe import import_bigmoe, read_bigmoe
from specmd_jax.trace.importers.common import Sizes
from specmd_jax.trace.importers.fingerprint import import_fingerprint
from specmd_jax.trace.importers.imp import import_imp
from specmd_jax.trace.importers.moe_sim import import_moe_sim
from specmd_jax.trace.importers.policylang import import_policylang
from specmd_jax.trace.importers.sglang import import_sglang
from specmd_jax.trace.importers.vllm import import_vllm
from specmd_jax.types import Trace

__all__ = ["IMPORTERS", "Importer", "import_bigmoe", "import_fingerprint", "import_trace", "read_bigmoe"]


class Importer(NamedTuple):
    """A foreign format."""

    read: Callable[..., Trace]  # of a path, and of `Sizes` unless the format has them; gives a validated trace
    about: str  # what is read, on one line
    has_sizes: bool = False  # the file says how many experts there are and how large


IMPORTERS: Mapping[str, Importer] = {
    "bigmoe-csv": Importer(import_bigmoe, "a BigMoeOnEdge route trace, also .gz or .xz", has_sizes=True),
    "gpt-oss-fingerprint": Importer(
        import_fingerprint, "an *_examples.json, a folder of them, or the .npz that packs them", has_sizes=True
    ),
    "vllm": Importer(import_vllm, "responses with routed_experts, as .jsonl, .json or .npz"),
    "sglang": Importer(import_sglang, "a per_token dump of the expert recorder: .pt (with torch), .json or .npz"),
    "moe-sim": Importer(import_moe_sim, "JSON Lines, a row per token and layer"),
    "moe-policylang": Importer(import_policylang, "its JSON Lines, a row per token and layer"),
    "imp-json": Importer(import_imp, "a moe_expert_trace, flat or nested"),
}
"""Format name -> how it is read."""


def import_trace(
    path: str | os.PathLike[str],
    fmt: str,
    *,
    model: str | None = None,
    experts: int | None = None,
    expert_bytes: int | None = None,
) -> Trace:
    """Reads ``path`` in the foreign format ``fmt`` (a key of `IMPORTERS`, in any case).

    Args:
      model: the model in `specmd_jax.specs.models.MODELS`, for formats that do not say its sizes.
      experts, expert_bytes: the same in numbers, for other models: experts of a layer, bytes of one.
    Raises:
      SpecmdError: an unknown format, a bad file, sizes that nobody says or that the format says itself.
    """
    fmt = find("trace format", fmt, IMPORTERS)
    importer, sizes = IMPORTERS[fmt], Sizes(model, experts, expert_bytes)
    extra: dict[str, Any] = {name: value for name, value in sizes._asdict().items() if value is not None}
    if importer.has_sizes:
        if extra:
            raise SpecmdError(f"{next(iter(extra))} is given, expected none: files of {fmt} say the model's sizes")
        return importer.read(path)
    return importer.read(path, sizes)
