"""The weights of a network in training: all layers stacked, float32; and the same as the inference model has them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.forward import Params

Weights = dict[str, Any]

EMBEDDING_DEVIATION = 0.02
ROUTER_PART = 0.25  # first logits that are all alike: no expert is ahead before anything is learned
ONES = ("attention_norm", "query_norm", "key_norm", "experts_norm")
ADAM = ("router",)  # a matrix, but its rows are logits of single experts


def shapes(cfg: MoEConfig) -> Weights:
    """Gives the shape of every array: ``embed`` (the head, too), ``norm``, and ``layers`` with a leading axis."""
    n, d, e, f = cfg.layers, cfg.width, cfg.experts, cfg.expert_width
    queries, keys = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    return {
        "embed": (cfg.vocabulary, d),
        "norm": (d,),
        "layers": {
            "attention_norm": (n, d),
            "query": (n, queries, d),
            "key": (n, keys, d),
            "value": (n, keys, d),
            "out": (n, d, queries),
            "query_norm": (n, cfg.head_dim),
            "key_norm": (n, cfg.head_dim),
            "experts_norm": (n, d),
            "router": (n, e, d),
            "gate_up": (n, e, 2 * f, d),
            "down": (n, e, d, f),
        },
    }


def initial(cfg: MoEConfig, key: jax.Array) -> Weights:
    """Gives normal random weights: projections keep their input's variance, those into the residual stream a part."""
    made: Weights = {"norm": jnp.ones((cfg.width,), jnp.float32), "layers": {}}
    made["embed"] = EMBEDDING_DEVIATION * jax.random.normal(jax.random.fold_in(key, 0), shapes(cfg)["embed"])
    for number, (name, shape) in enumerate(shapes(cfg)["layers"].items(), 1):
        if name in ONES:
            made["layers"][name] = jnp.ones(shape, jnp.float32)
            continue
        deviation = shape[-1] ** -0.5
        if name in ("out", "down"):
            deviation *= (2 * cfg.layers) ** -0.5
        if name == "router":
            deviation *= ROUTER_PART
        made["layers"][name] = deviation * jax.random.normal(jax.random.fold_in(key, number), shape)
    return made


def matrices(weights: Weights) -> Weights:
    """Marks what an optimizer of matrices takes: the projections of layers but the router."""
    layers = {name: leaf.ndim > 2 and name not in ADAM for name, leaf in weights["layers"].items()}
    return {"embed": False, "norm": False, "layers": layers}


def decayed(weights: Weights) -> Weights:
    """Marks what weight decay takes: every matrix but the embedding."""
    return matrices(weights) | {"layers": {name: leaf.ndim > 2 for name, leaf in weights["layers"].items()}}


def active_matmul_weights(cfg: MoEConfig) -> int:
    """Gives the weights that a token is multiplied by: of its top_k experts, all else, and the head."""
    every, sizes = 0, shapes(cfg)
    for name, shape in sizes["layers"].items():
        if len(shape) > 2:
            size = int(np.prod(shape))
            every += size * cfg.top_k // cfg.experts if name in ("gate_up", "down") else size
    return every + int(np.prod(sizes["embed"]))


def total_weights(cfg: MoEConfig) -> int:
    """Gives the number of all weights; the head is the embedding and counts once."""
    return sum(int(np.prod(shape)) for shape in jax.tree.leaves(shapes(cfg), is_leaf=lambda x: isinstance(x, tuple)))


def served(cfg: MoEConfig, weights: Weights) -> tuple[Params, tuple[Expert, ...]]:
    """Gives what `specmd_jax.moe.forward` takes, in the configuration's type: dense parameters, stacks of experts."""
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(cfg.np_dtype), weights)
    rows, embed = cast["layers"], {"weight": cast["embed"]}
    layers = {}
    for index in range(cfg.layers):
        own = {name: {"weight": leaf[index]} for name, leaf in rows.items()}
        attention = {name: own[name] for name in ("query", "key", "value", "out", "query_norm", "key_norm")}
        layers[index] = {"attention": attention} | {
            name: own[name] for name in ("attention_norm", "experts_norm", "router")
        }
    params = {"embed": embed, "layers": layers, "head": {"norm": {"weight": cast["norm"]}, "project": embed}}
    stacks = tuple(Expert(rows["gate_up"][index], rows["down"][index]) for index in range(cfg.layers))
    return params, stacks
