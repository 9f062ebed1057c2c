"""Which experts a token uses, from its router's logits: one warp, so that a policy can follow in the same program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.moe.kernels.rows import lanes, load
from specmd_jax.moe.model.config import MoEConfig

SERVED = ("softmax_topk", "topk_softmax")  # keys of `routing.ROUTERS`


def choose(cfg: MoEConfig, logits: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Chooses K experts and their gates, as `routing.ROUTERS` does; all scalars. Runs inside a kernel.

    ``logits`` [P] float32 with P >= E a power of two; what is behind E does not matter. Ties go to the lower id. Where
    logits are NaN the ids are within 0..E-1, but not the ones of the plain routers.
    """
    lane = jnp.arange(logits.shape[0], dtype=jnp.int32)
    real = lane < cfg.experts
    scores = jnp.where(real, logits, -jnp.inf)
    if cfg.router == "softmax_topk":
        weight = jnp.exp(scores - jnp.max(scores))
        scores = weight / jnp.sum(weight)
    open_, ids, picked = real, [], []
    for _ in range(cfg.top_k):
        best = jnp.max(jnp.where(open_, scores, -jnp.inf))
        first = jnp.min(jnp.where(open_ & (scores == best), lane, cfg.experts - 1))
        open_ &= lane != first
        ids.append(first)
        picked.append(best)
    return ids, _gates(cfg, picked)


def _gates(cfg: MoEConfig, picked: list[jax.Array]) -> list[jax.Array]:
    """Gives the gates of the chosen, whose probabilities (or logits, `topk_softmax`) fall."""
    if cfg.router == "topk_softmax":
        picked = [jnp.exp(logit - picked[0]) for logit in picked]
    elif not cfg.renormalize:
        return [prob * cfg.gate_scale for prob in picked]
    total = picked[0]
    for one in picked[1:]:
        total = total + one
    scale = 1.0 if cfg.router == "topk_softmax" else cfg.gate_scale  # the plain routers scale probabilities alone
    return [one / total * scale for one in picked]


def choose_experts(cfg: MoEConfig, logits: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Gives ids [1, K] int32 and gates [1, K] float32 of the logits [1, E] float32; for routers in `SERVED`."""

    def choose_row(logits_ref: Any, ids_ref: Any, gates_ref: Any) -> None:
        lane, mask = lanes(cfg.experts)
        for k, (expert, gate) in enumerate(zip(*choose(cfg, load(logits_ref, (0, lane), mask)), strict=True)):
            ids_ref[0, k] = expert
            gates_ref[0, k] = gate

    shapes = [jax.ShapeDtypeStruct((1, cfg.top_k), dtype) for dtype in (jnp.int32, jnp.float32)]
    ids, gates = pl.pallas_call(
        choose_row,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="choose_row",
    )(logits)
    return ids, gates
