"""Every array shape and unit in one place.

Axis letters, used in all annotations, comments and docstrings::

    L  MoE layers           E  experts of a layer      K  routed experts of a token
    R  requests             N  tokens                  V  visits (a pass reaching a layer)
    M  most experts that one visit of a schedule can demand
    H  prefetch horizon in layers                      Q  stored precisions of an expert

Annotations say shapes with these letters (``Int32[np.ndarray, "V E"]``); the tests execute them, so that one letter
means one size within a call. Small letters are local to a function or a record, which says what they are.

An expert's *flat id* is ``layer * E + expert``. Seconds end in ``_s``, bytes in ``_bytes``, rates in ``_per_s``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, Int32, Int64, Integer

NEVER = 1 << 30
"""``next_use`` of an expert that no later visit demands."""

PREFILL, DECODE = 0, 1
"""Values of ``Schedule.phase``."""


@dataclass(frozen=True, repr=False)
class Trace:
    """Routing of a model over some requests, one row per token; `specmd_jax.trace` reads, checks and writes it."""

    expert_ids: Integer[np.ndarray, "N L K"]  # by falling gate; -1: no expert (a skipped layer)
    lengths: Int32[np.ndarray, " R"]  # tokens of each request; they sum to N
    prompt_lengths: Int32[np.ndarray, " R"]  # how many of them are prompt (0: decode only)
    experts: int  # E
    expert_bytes: Int64[np.ndarray, " L"]  # bytes of one expert at its native precision
    gates: Float32[np.ndarray, "N L K"] | None = None  # share of each chosen expert
    logits: Float[np.ndarray, "N L E"] | None = None  # the router's full logits
    ahead: Float[np.ndarray, "N L E"] | None = None  # gate of layer l+1 on the activations of layer l, as probabilities
    meta: dict[str, Any] = field(default_factory=dict)  # model, source, licence, capture notes, a row per request, ...

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

    def __repr__(self) -> str:
        """Gives one line: the model, how much there is of it, and which of the optional arrays."""
        try:
            size = f"{self.tokens:,} tokens, {self.requests:,} requests"
            shape = f"{self.layers} layers x {self.experts} experts top-{self.top_k}"
            has = [name for name in ("gates", "logits", "ahead") if getattr(self, name) is not None]
            return f"Trace({self.model}: {size}, {shape}, {' and '.join(has) or 'ids only'})"
        except (AttributeError, IndexError):  # an invalid trace, which must be shown, too
            return "Trace(invalid: see specmd_jax.trace.validate)"


@dataclass(frozen=True)
class Schedule:
    """The visits of a replay in order (numpy, on the host): what the engines replay. See CONTRACT.md section 1."""

    layers: int
    experts: int
    most: int  # M
    layer: Int32[np.ndarray, " V"]
    pass_id: Int32[np.ndarray, " V"]  # counts from 0 over the whole schedule
    phase: Int8[np.ndarray, " V"]  # PREFILL or DECODE
    request: Int32[np.ndarray, " V"]  # first request that takes part in the pass
    tokens: Int32[np.ndarray, " V"]  # tokens of the pass; with drafts, all that it verifies
    clock: Int32[np.ndarray, " V"]  # sum over earlier visits of (demanded experts + 1)
    starts_pass: Bool[np.ndarray, " V"]  # first visit of its pass
    ends_layer: Bool[np.ndarray, " V"]  # last visit of (pass, layer): dense part and prefetch happen here
    reset: Bool[np.ndarray, " V"]  # the cache is emptied before this visit
    counted: Bool[np.ndarray, " V"]  # the visit enters the metrics
    count: Int32[np.ndarray, "V E"]  # tokens of the pass routed to each expert; demand = count > 0
    mass: Float32[np.ndarray, "V E"]  # summed gates
    rank: Int32[np.ndarray, "V E"]  # 0..n-1 by last position in token-major gate order; -1: not demanded
    next_use: Int32[np.ndarray, "V E"]  # next visit that demands it, NEVER if none or not demanded here
    by_mass: Int32[np.ndarray, "V M"]  # demanded ids by falling mass (ties: lower id), padded with -1
    ahead: Float32[np.ndarray, "V E"] | None = None  # scores of layer l+1 summed over the pass's tokens
    logits: Float32[np.ndarray, "V t E"] | None = None  # full logits of the pass's tokens (t = most tokens; NaN pads)
    first_visit: int = 0  # number of the first visit: above 0 in a stretch of a longer schedule
    kept: Int32[np.ndarray, " V"] | None = None  # tokens that the pass keeps; None: all, as nothing is drafted
    turns: Int32[np.ndarray, " V"] | None = None  # requests that take part in the pass; None: one per decoded token
    drafting_s: Float32[np.ndarray, "V 2"] | None = None  # before the gate, and between the visit's end and the next

    @property
    def visits(self) -> int:
        return self.layer.shape[0]

    @property
    def served(self) -> Int32[np.ndarray, " V"]:
        """Requests that take part in each decode pass."""
        return self.tokens if self.turns is None else self.turns

    @property
    def demanded(self) -> Int64[np.ndarray, " V"]:
        """Demanded experts of each visit."""
        return (self.count > 0).sum(axis=1)
