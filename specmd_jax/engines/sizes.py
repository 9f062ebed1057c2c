"""How much each expert takes of a cache, and what each layer asks of the hardware."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError, spelling
from specmd_jax.replay.timing import Work
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.models import MODELS, ModelSpec
from specmd_jax.specs.record import META_KEY, from_record
from specmd_jax.types import Trace

MOST_UNITS = (1 << 30) - 1
"""Units that all experts take together, at most: sums of two such numbers fit int32."""
MOST_ROUNDING = 1e-3
"""Sizes that whole units would change by a larger share are refused."""


class Sizes(NamedTuple):
    """Expert sizes in whole units (CONTRACT.md section 2), so that budgets are exact in int32."""

    unit_bytes: int
    units: npt.NDArray[np.int32]  # [Q + 1, L], row 0 is 0
    level_bytes: npt.NDArray[np.int64]  # [Q, L], exact: what is copied and read
    experts: int  # E

    def budget(self, budget: Budget) -> npt.NDArray[np.int32]:
        """Gives whole units of a budget in bytes, rounded down; more than everything is everything."""
        most = int(self.units[-1].max()) * self.units.shape[1] << 12
        given, all_units = np.asarray(budget, np.int64), self.units[-1].astype(np.int64) * self.experts
        all_bytes = self.level_bytes[-1] * self.experts
        if given.ndim == 0:
            all_units, all_bytes = all_units.sum(), all_bytes.sum()
        whole = given // self.unit_bytes
        whole = np.where(given >= all_bytes, np.maximum(whole, all_units), whole)
        return np.minimum(whole, min(most, 2**30)).astype(np.int32)


def sizes(
    expert_bytes: npt.NDArray[np.int64], experts: int, precisions: tuple[float, ...] | None, native_bits: float
) -> Sizes:
    """Sizes of experts stored at `precisions` (ascending bits), or as the trace says when None."""
    if precisions is None:
        levels = [[int(b) for b in expert_bytes]]
    else:
        ascending = list(precisions) == sorted(set(precisions)) and len(precisions) > 0
        if not ascending or not all(0 < bits < math.inf for bits in precisions):
            raise SpecmdError(f"precisions {precisions}: expected ascending bits, such as (4, 8)")
        levels = [[math.ceil(int(b) * bits / native_bits) for b in expert_bytes] for bits in precisions]
    return in_units(np.array(levels, np.int64), experts)


def in_units(level_bytes: npt.NDArray[np.int64], experts: int) -> Sizes:
    """Counts sizes [Q, L] of L x `experts` experts in whole units: of their greatest common divisor where all experts
    are few enough of them, else of the smallest number of bytes that makes them so, rounded up.

    Raises SpecmdError if that would change a size by more than `MOST_ROUNDING`.
    """
    layers, largest = level_bytes.shape[1], int(level_bytes.max())
    unit = math.gcd(*(int(b) for b in level_bytes.flat))
    if layers * experts * (largest // unit) > MOST_UNITS:
        unit = -(-largest // max(1, MOST_UNITS // (layers * experts)))
    units = -(-level_bytes // unit)
    change = float((units * unit / level_bytes - 1).max())
    if change > MOST_ROUNDING:
        raise SpecmdError(
            f"expert_bytes from {level_bytes.min()} to {level_bytes.max()} for {layers * experts} experts: expected "
            f"sizes that whole numbers up to 2^30 in all tell apart, these would change by {100 * change:.2g} %"
        )
    return Sizes(unit, np.concatenate([np.zeros((1, layers)), units]).astype(np.int32), level_bytes, experts)


def work(trace: Trace, level_bytes: npt.NDArray[np.int64], native_bits: float, context: int = 0) -> Work:
    """Gives what each layer asks of the hardware, with attention over `context` tokens.

    A model that the trace describes, or that `MODELS` knows, brings its dense part and head. Else the trace's meta may
    (`dense_bytes`, one or one per layer); without it, the dense part costs a launch.
    """
    spec = _known(trace)
    check_context(trace, context)
    if spec is not None:
        flops, dense_flops = float(spec.expert_flops_per_token), float(spec.dense_flops_per_token)
        dense_bytes, head = float(spec.dense_bytes), (float(spec.head_bytes), float(spec.head_flops_per_token))
    else:
        flops = 2.0 * float(trace.expert_bytes.mean()) * 8 / native_bits
        dense_flops, dense_bytes, head = 0.0, 0.0, (0.0, 0.0)
    by_layer = np.full(trace.layers, dense_bytes)
    if "dense_bytes" in trace.meta:
        by_layer = np.broadcast_to(np.asarray(trace.meta["dense_bytes"], np.float64), (trace.layers,)).copy()
    dense_flops_by_layer = np.full(trace.layers, dense_flops if spec is not None else 0.0)
    if spec is None:
        dense_flops_by_layer = 2.0 * by_layer * 8 / native_bits
    by_layer[-1] += head[0]
    dense_flops_by_layer[-1] += head[1]
    return Work(
        expert_bytes=jnp.asarray(level_bytes, jnp.float32),
        expert_flops=jnp.full(trace.layers, flops, jnp.float32),
        dense_bytes=jnp.asarray(by_layer, jnp.float32),
        dense_flops=jnp.asarray(dense_flops_by_layer, jnp.float32),
        context_bytes=jnp.full(trace.layers, spec.context_bytes(context), jnp.float32) if spec and context else None,
        context_flops=jnp.full(trace.layers, spec.context_flops(context), jnp.float32) if spec and context else None,
    )


def check_context(trace: Trace, context: int) -> None:
    """Raises SpecmdError for a context of a model (the trace's head is enough) whose attention is not known."""
    if not context:
        return
    spec = _known(trace)
    if spec is None:
        raise SpecmdError(
            f"context is {context}, but nothing is known of the attention of model {trace.model!r}: expected 0, or a "
            f"model of {', '.join(MODELS)}"
        )
    spec.context_bytes(context)


def native_bits(trace: Trace) -> float:
    """Bits an expert weight takes in the trace's `expert_bytes`: of the trace's meta, else of the preset, else 16."""
    if "weights_bits" in trace.meta:
        return float(trace.meta["weights_bits"])
    spec = _known(trace)
    if spec is None:
        return 16.0
    return 8.0 * float(trace.expert_bytes.mean()) / spec.expert_params


def _known(trace: Trace) -> ModelSpec | None:
    """Gives what the trace says of its model, or what is published under its name in any case; None: neither."""
    if META_KEY in trace.meta:
        return from_record(trace.meta[META_KEY], f"meta key {META_KEY!r} of a trace of {trace.model}")
    name = spelling(trace.model, MODELS)
    return None if name is None else MODELS[name]
