"""How the requests that a reader found become a trace, with the sizes of its model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError, spelling
from specmd_jax.specs.models import MODELS, model
from specmd_jax.specs.record import META_KEY, to_record
from specmd_jax.specs.spec import ModelSpec
from specmd_jax.trace.importers.meaning import FULL, Known, examined
from specmd_jax.types import Trace


class Sizes(NamedTuple):
    """What the user says of a model whose trace does not: a name in `specmd_jax.specs.models.MODELS`, or numbers."""

    model: str | None = None
    experts: int | None = None
    expert_bytes: int | None = None
    top_k: int | None = None


UNSAID = Sizes()


class Part(NamedTuple):
    """The routing of one request: ids [T, L, K], the first `prompt` tokens of it a prompt."""

    ids: npt.NDArray[np.int64]
    prompt: int
    row: dict[str, Any]  # of meta["requests"]
    gates: npt.NDArray[np.float32] | None = None  # [T, L, K]; all parts have them, or none
    logits: npt.NDArray[np.floating[Any]] | None = None  # [T, L, E], likewise


def spec_of(sizes: Sizes, name: str | None = None) -> ModelSpec | None:
    """Gives the model that the user names, or that a file names and `MODELS` has; None if neither."""
    known = sizes.model or (name or "").rpartition("/")[2]
    return model(known) if sizes.model or spelling(known, MODELS) else None


def top_k_of(path: Path, sizes: Sizes, name: str | None = None) -> int:
    """Gives K for a file that does not say it. Raises SpecmdError if nobody does."""
    spec = spec_of(sizes, name)
    found = sizes.top_k if sizes.top_k is not None else spec.top_k if spec else None
    if found is None or found < 1:
        raise SpecmdError(
            f"{path}: does not say top_k, expected it to be given (at least 1), or the model (one of "
            f"{', '.join(MODELS)})"
        )
    return found


def join(
    path: Path,
    parts: Sequence[Part],
    sizes: Sizes,
    meta: dict[str, Any],
    name: str | None,
    experts: int | None = None,
    *,
    strip: Collection[str] = (),
    known: Known = FULL,
) -> Trace:
    """Gives a validated trace of `parts`, which agree in L and K, with the sizes of its model.

    Args:
      name: the model's name in the file; one that `MODELS` has (behind a repository's owner) gives the sizes.
      experts: E, where the file says it.
      strip, known: see `meaning.examined`.
    Raises:
      SpecmdError: E or the bytes of an expert are said by nobody, the model has another shape, or what `examined` says.
    """
    asked = sizes.experts is None or sizes.expert_bytes is None  # else the numbers hold, whatever the name
    spec = spec_of(sizes, name) if sizes.model or asked else None
    said = (sizes.experts, experts, spec.experts if spec else None)
    experts = next((value for value in said if value is not None), None)
    expert_bytes = sizes.expert_bytes if sizes.expert_bytes is not None or spec is None else spec.expert_bytes
    for what, value in (("experts", experts), ("expert_bytes", expert_bytes)):
        if value is None:
            raise SpecmdError(
                f"{path}: does not say {what}, expected it to be given, or the model (one of {', '.join(MODELS)})"
            )
        if not 1 <= value < 1 << 62:
            raise SpecmdError(f"{path}: {what} is {value}, expected at least 1")
    assert experts is not None and expert_bytes is not None
    gates = [part.gates for part in parts if part.gates is not None]
    logits = [part.logits for part in parts if part.logits is not None]
    trace = Trace(
        expert_ids=np.concatenate([part.ids for part in parts]),
        lengths=np.array([len(part.ids) for part in parts], np.int32),
        prompt_lengths=np.array([part.prompt for part in parts], np.int32),
        experts=experts,
        expert_bytes=np.full(parts[0].ids.shape[1], expert_bytes, np.int64),
        gates=np.concatenate(gates) if len(gates) == len(parts) else None,
        logits=np.concatenate(logits) if len(logits) == len(parts) else None,
        meta={"model": spec.name if spec else name or "unknown", "licence": "unknown"}
        | ({META_KEY: to_record(spec)} if spec and spec != MODELS.get(spec.name) else {})
        | meta
        | {"requests": [part.row for part in parts]},
    )
    trace = examined(trace, str(path), strip, known)
    wanted = (spec.layers, spec.top_k) if spec else (trace.layers, sizes.top_k or trace.top_k)
    if (trace.layers, trace.top_k) != wanted:
        raise SpecmdError(
            f"{path}: {trace.layers} MoE layers and {trace.top_k} experts per token, "
            f"expected {wanted[0]} and {wanted[1]}" + (f" as {spec.name} has" if spec else "")
        )
    return trace
