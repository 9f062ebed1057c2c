"""What the model that comes with this package does with texts of its domains, as traces and as activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.measure.reading import Reading, read
from specmd_jax.reference import REFERENCE, held_out_windows, reference_folder

Texts = Mapping[str, npt.NDArray[np.integer[Any]]]
"""[W, T] token ids of each domain."""


def held_out_texts(places: Sequence[int], tokens: int = 512) -> dict[str, npt.NDArray[np.uint16]]:
    """Gives some of the texts that come with the package, of each domain, cut to ``tokens``.

    Raises SpecmdError for places or tokens that there are not.
    """
    found = {name: rows for name, rows in held_out_windows().items() if rows.ndim == 2}
    there, length = next(iter(found.values())).shape
    if not places or min(places) < 0 or max(places) >= there:
        raise SpecmdError(f"texts of each domain: {list(places)}, expected some of 0 to {there - 1}")
    if not 1 <= tokens < length:
        raise SpecmdError(f"tokens of a text: {tokens}, expected 1 to {length - 1}")
    return {name: rows[list(places), :tokens] for name, rows in found.items()}


def read_texts(texts: Texts, source: str) -> Reading:
    """Gives what the model does with texts; ``source`` says where they are from. Every text is a request."""
    rows = [{"dataset": name, "category": name} for name, of_domain in texts.items() for _ in of_domain]
    meta = {
        "model": REFERENCE,
        "source": f"{REFERENCE}, as shipped (experts at int4), on {source}",
        "licence": "Apache-2.0",
    }
    return read(reference_folder(), np.concatenate(list(texts.values())).astype(np.int32), rows, meta)
