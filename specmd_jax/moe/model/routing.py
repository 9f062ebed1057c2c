"""Routers: which K experts a token uses and with what gates, from the router's logits.

Each rule is a pure function ``(cfg, logits, bonus) -> (ids, gates)``:

    logits  [N, E] float32   the router's output
    bonus   [E] float32      added to the logits for *choosing* only (cache-aware routing); None: nothing added
    ids     [N, K] int32     chosen experts; by falling gate, except `sparsemixer` (first and second choice)
    gates   [N, K] float32   their weights, always from the original logits

Ties go to the lower expert id.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model.config import MoEConfig

Router = Callable[[MoEConfig, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


def _biased(logits: jax.Array, bonus: jax.Array | None) -> jax.Array:
    return logits if bonus is None else logits + bonus[None, :]


def softmax_topk(cfg: MoEConfig, logits: jax.Array, bonus: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Probabilities over all experts, then the K largest; `renormalize` makes the chosen gates sum to 1.

    OLMoE (arXiv:2409.02060), Qwen MoE, DeepSeek-V2 greedy; with `renormalize` also Mixtral (arXiv:2401.04088).
    """
    probs = jax.nn.softmax(logits, axis=-1)
    chosen_from = probs if bonus is None else jax.nn.softmax(_biased(logits, bonus), axis=-1)
    return _gates(cfg, probs, lax.top_k(chosen_from, cfg.top_k)[1])


def topk_softmax(cfg: MoEConfig, logits: jax.Array, bonus: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Gives the K largest logits, then a softmax over those (gpt-oss)."""
    ids = lax.top_k(_biased(logits, bonus), cfg.top_k)[1]
    return ids, jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)


def grouped(cfg: MoEConfig, logits: jax.Array, bonus: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`softmax_topk` within the `groups_kept` groups with the most probable experts (DeepSeek-V2, arXiv:2405.04434)."""
    probs = jax.nn.softmax(logits, axis=-1)
    chosen_from = probs if bonus is None else jax.nn.softmax(_biased(logits, bonus), axis=-1)
    per_group = cfg.experts // cfg.groups
    best = chosen_from.reshape(-1, cfg.groups, per_group).max(axis=-1)  # [N, groups]
    kept = jax.nn.one_hot(lax.top_k(best, cfg.groups_kept)[1], cfg.groups, dtype=jnp.bool_).any(axis=1)
    allowed = jnp.repeat(kept, per_group, axis=-1, total_repeat_length=cfg.experts)
    return _gates(cfg, probs, lax.top_k(jnp.where(allowed, chosen_from, 0.0), cfg.top_k)[1])


def sparsemixer(cfg: MoEConfig, logits: jax.Array, bonus: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Two successive arg-maxima, each gated against its near rivals (Phi-3.5-MoE, arXiv:2409.12136).

    The gate of a choice is its softmax share among the experts whose logit lies within ``2 * router_jitter`` of it,
    relative to the larger of the two magnitudes; the second choice is made without the first.
    """
    if bonus is not None:
        raise SpecmdError(f"{cfg.family}: the sparsemixer router gates by rivalry and takes no cache-aware bonus")
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


def _gates(cfg: MoEConfig, probs: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    gates = jnp.take_along_axis(probs, ids, axis=-1)
    if cfg.renormalize:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    return ids, gates * cfg.gate_scale


ROUTERS: dict[str, Router] = {
    "softmax_topk": softmax_topk,
    "topk_softmax": topk_softmax,
    "grouped": grouped,
    "sparsemixer": sparsemixer,
}

IN_ORDER = ("softmax_topk", "topk_softmax", "grouped")
"""Routers that give a token's choices by falling gate."""
