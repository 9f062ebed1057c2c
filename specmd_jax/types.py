"""Every array shape and unit in one place.

Axis letters, used in all comments and docstrings::

    L  MoE layers           E  experts of a layer      K  routed experts of a token
    R  requests             N  tokens                  V  visits (a pass reaching a layer)
    M  most experts that one visit of a schedule can demand
    H  prefetch horizon in layers                      Q  stored precisions of an expert

An expert's *flat id* is ``layer * E + expert``. Seconds end in ``_s``, bytes in ``_bytes``, rates in ``_per_s``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NEVER = 1 << 30
"""``next_use`` of an expert that no later visit demands."""

PREFILL, DECODE = 0, 1
"""Values of ``Schedule.phase``."""


@dataclass(frozen=True)
class Trace:
    """Routing of a model over some requests, one row a token; `trace.store` reads, checks and writes it."""

    expert_ids: npt.NDArray[Any]  # [N, L, K] integer, by falling gate; -1: no expert (a skipped layer)
    lengths: npt.NDArray[np.int32]  # [R] tokens of each request; they sum to N
    prompt_lengths: npt.NDArray[np.int32]  # [R] how many of them are prompt (0: decode only)
    experts: int  # E
    expert_bytes: npt.NDArray[np.int64]  # [L] bytes of one expert at its native precision
    gates: npt.NDArray[np.float32] | None = None  # [N, L, K] share of each chosen expert
    logits: npt.NDArray[Any] | None = None  # [N, L, E] the router's full logits
    ahead: npt.NDArray[Any] | None = None  # [N, L, E] gate of layer l+1 on the activations of layer l, as probabilities
    meta: dict[str, Any] = field(default_factory=dict)  # model, source, licence, capture notes, a row a request, ...

    @property
    def tokens(self) -> int:
        return self.expert_ids.shape[0]

    @property
    def layers(self) -> int:
        return self.expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[2]

    @property
    def requests(self) -> int:
        return self.lengths.shape[0]

    @property
    def model(self) -> str:
        return str(self.meta.get("model", "unknown"))


@dataclass(frozen=True)
class Schedule:
    """The visits of a replay in order (numpy, on the host): what `simulate` scans over. See CONTRACT.md section 1."""

    layers: int
    experts: int
    most: int  # M
    layer: npt.NDArray[np.int32]  # [V]
    pass_id: npt.NDArray[np.int32]  # [V] counts from 0 over the whole schedule
    phase: npt.NDArray[np.int8]  # [V] PREFILL or DECODE
    request: npt.NDArray[np.int32]  # [V] first request that takes part in the pass
    tokens: npt.NDArray[np.int32]  # [V] tokens of the pass
    clock: npt.NDArray[np.int32]  # [V] sum over earlier visits of (demanded experts + 1)
    starts_pass: npt.NDArray[np.bool_]  # [V] first visit of its pass
    ends_layer: npt.NDArray[np.bool_]  # [V] last visit of (pass, layer): dense part and prefetch happen here
    reset: npt.NDArray[np.bool_]  # [V] the cache is emptied before this visit
    counted: npt.NDArray[np.bool_]  # [V] the visit enters the metrics
    count: npt.NDArray[np.int32]  # [V, E] tokens of the pass routed to each expert; demand = count > 0
    mass: npt.NDArray[np.float32]  # [V, E] summed gates
    rank: npt.NDArray[np.int32]  # [V, E] 0..n-1 by last position in token-major gate order; -1: not demanded
    next_use: npt.NDArray[np.int32]  # [V, E] next visit that demands it, NEVER if none or not demanded here
    by_mass: npt.NDArray[np.int32]  # [V, M] demanded ids by falling mass (ties: lower id), padded with -1
    ahead: npt.NDArray[np.float32] | None = None  # [V, E] scores of layer l+1 summed over the pass's tokens
    logits: npt.NDArray[np.float32] | None = (
        None  # [V, T, E] full logits of the pass's tokens (T = most tokens; NaN pads)
    )
    first_visit: int = 0  # number of the first visit: above 0 in a stretch of a longer schedule

    @property
    def visits(self) -> int:
        return self.layer.shape[0]

    @property
    def demanded(self) -> npt.NDArray[np.int64]:
        """[V] demanded experts of each visit."""
        return (self.count > 0).sum(axis=1)


class Shape(NamedTuple):
    """What a policy may size its tables by."""

    layers: int
    experts: int
