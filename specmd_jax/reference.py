"""The small mixture of experts that comes with the package, and its held-out text. Imports no JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.archives import arrays_of
from specmd_jax.errors import SpecmdError

REFERENCE = "specmd-reference"
"""What names it wherever the folder of a checkpoint is asked for."""
HELD_OUT = "held_out.npz"
BYTES_PER_TOKEN = "bytes_per_token"
PACKING = "packing.csv"
"""Bits per byte before and after the model was packed, by domain."""


class HeldOut(NamedTuple):
    """Held-out text of a domain."""

    windows: npt.NDArray[Any]  # [W, S + 1] token ids; each begins without context
    bytes_per_token: float  # mean over the domain


def reference_folder() -> Path:
    """Gives the checkpoint's folder: config.json, safetensors at few bits, tokenizer.json, README.md."""
    return Path(__file__).parent / "moe" / "data" / REFERENCE


def held_out_windows(folder: Path | None = None) -> dict[str, npt.NDArray[Any]]:
    """Gives windows [W, S + 1] of token ids from held-out text, by domain, and ``bytes_per_token`` [domains] in their
    order: of the model that comes with the package ([8, 513], [5]), or of another checkpoint's folder."""
    return arrays_of((folder or reference_folder()) / HELD_OUT, "held-out text (.npz)")


def held_out_texts(folder: Path | None = None) -> dict[str, HeldOut]:
    """Gives the same by domain. Raises SpecmdError for a file that is no such text."""
    windows = held_out_windows(folder)
    sizes = windows.pop(BYTES_PER_TOKEN, np.zeros(0))
    place = (folder or reference_folder()) / HELD_OUT
    if not windows or sizes.shape != (len(windows),) or not (sizes > 0).all():
        raise SpecmdError(
            f"{place}: expected windows of each domain, and {BYTES_PER_TOKEN} above 0, one for each of them"
        )
    for name, rows in windows.items():
        if rows.ndim != 2 or rows.dtype.kind not in "iu" or rows.shape[0] < 1 or rows.shape[1] < 2 or rows.min() < 0:
            raise SpecmdError(
                f"{place}: {name} is {rows.dtype} {list(rows.shape)}, expected token ids [windows, tokens]"
            )
    return {name: HeldOut(rows, float(size)) for (name, rows), size in zip(windows.items(), sizes, strict=True)}
