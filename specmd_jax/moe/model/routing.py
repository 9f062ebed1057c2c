"""Routers: which K experts a token uses and with what gates, from the router's logits.

Each rule is a pure function ``(cfg, logits) -> (ids, gates)``:

    logits  [N, E] float32   the router's output
    ids     [N, K] int32     chosen experts; by falling gate, except `sparsemixer` (first and second choice)
    gates   [N, K] float32   their weights

Ties go to the lower expert id. `weigh` gives the gates of experts that somebody else chose.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model.config import MoEConfig

Router = Callable[[MoEConfig, jax.Array], tuple[jax.Array, jax.Array]]


def softmax_topk(cfg: MoEConfig, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities over all experts, then the K largest; `renormalize` makes the chosen gates sum to 1.

    OLMoE (arXiv:2409.02060), Qwen MoE, DeepSeek-V2 greedy; with `renormalize` also Mixtral (arXiv:2401.04088).
    """
    probs = jax.nn.softmax(logits, axis=-1)
    ids = lax.top_k(probs, cfg.top_k)[1]
    return ids, _share_of_all(cfg, probs, ids)


def topk_softmax(cfg: MoEConfig, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives the K largest logits, then a softmax over those (gpt-oss)."""
    ids = lax.top_k(logits, cfg.top_k)[1]
    return ids, _share_of_chosen(cfg, logits, ids)


def grouped(cfg: MoEConfig, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`softmax_topk` within the `groups_kept` groups with the most probable experts (DeepSeek-V2, arXiv:2405.04434)."""
    probs = jax.nn.softmax(logits, axis=-1)
    per_group = cfg.experts // cfg.groups
    best = probs.reshape(-1, cfg.groups, per_group).max(axis=-1)  # [N, groups]
    kept = jax.nn.one_hot(lax.top_k(best, cfg.groups_kept)[1], cfg.groups, dtype=jnp.bool_).any(axis=1)
    allowed = jnp.repeat(kept, per_group, axis=-1, total_repeat_length=cfg.experts)
    ids = lax.top_k(jnp.where(allowed, probs, 0.0), cfg.top_k)[1]
    return ids, _share_of_all(cfg, probs, ids)


def sparsemixer(cfg: MoEConfig, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two successive arg-maxima, each gated against its near rivals (Phi-3.5-MoE, arXiv:2409.12136).

    The gate of a choice is its softmax share among the experts whose logit lies within ``2 * router_jitter`` of it,
    relative to the larger of the two magnitudes; the second choice is made without the first.
    """
    first_id, first_gate = _sparsemixer_choice(cfg, logits, logits)
    rest = jnp.where(jax.nn.one_hot(first_id, cfg.experts, dtype=jnp.bool_), -jnp.inf, logits)
    second_id, second_gate = _sparsemixer_choice(cfg, logits, rest)
    return jnp.stack([first_id, second_id], axis=-1), jnp.stack([first_gate, second_gate], axis=-1)


def _sparsemixer_choice(cfg: MoEConfig, logits: jax.Array, open_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    best = open_logits.max(axis=-1, keepdims=True)
    far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * cfg.router_jitter
    share = jax.nn.softmax(jnp.where(far, -jnp.inf, open_logits), axis=-1)
    chosen = jnp.argmax(open_logits, axis=-1).astype(jnp.int32)
    return chosen, jnp.take_along_axis(share, chosen[:, None], axis=-1)[:, 0]


def _share_of_all(cfg: MoEConfig, probs: jax.Array, ids: jax.Array) -> jax.Array:
    gates = jnp.take_along_axis(probs, ids, axis=-1)
    if cfg.renormalize:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    return gates * cfg.gate_scale


def _share_of_chosen(cfg: MoEConfig, logits: jax.Array, ids: jax.Array) -> jax.Array:
    del cfg
    return jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)


def weigh(cfg: MoEConfig, logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Gives the gates [N, K] of any ``ids`` [N, K] by the model's own rule, from its logits; for routers in `WEIGHERS`.

    Raises:
        SpecmdError: as `check_weighs`.
    """
    check_weighs(cfg)
    return WEIGHERS[cfg.router](cfg, logits, ids)


def check_weighs(cfg: MoEConfig) -> None:
    """Raises SpecmdError for a router whose gates are not those of any experts that are given."""
    if cfg.router not in WEIGHERS:
        raise SpecmdError(
            f"{cfg.family}: its router {cfg.router!r} does not choose the K largest logits and weighs no others, "
            f"expected one of {', '.join(WEIGHERS)}"
        )


ROUTERS: dict[str, Router] = {
    "softmax_topk": softmax_topk,
    "topk_softmax": topk_softmax,
    "grouped": grouped,
    "sparsemixer": sparsemixer,
}

WEIGHERS: dict[str, Callable[[MoEConfig, jax.Array, jax.Array], jax.Array]] = {
    "softmax_topk": lambda cfg, logits, ids: _share_of_all(cfg, jax.nn.softmax(logits, axis=-1), ids),
    "topk_softmax": _share_of_chosen,
}
"""Routers that choose the K largest logits, and so have gates for any K experts."""

IN_ORDER = ("softmax_topk", "topk_softmax", "grouped")
"""Routers that give a token's choices by falling gate."""
