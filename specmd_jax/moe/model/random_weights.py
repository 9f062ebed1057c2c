"""Made-up weights of any configuration: for tests, and for timing a shape without its checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.forward import Params, param_spec


def random_params(cfg: MoEConfig, key: jax.Array) -> Params:
    """Gives random dense weights, on the default device."""
    spec = param_spec(cfg)
    leaves, tree = jax.tree_util.tree_flatten_with_path(spec)
    keys = jax.random.split(key, len(leaves))
    params = jax.tree.unflatten(
        tree, [_random_leaf(k, jax.tree_util.keystr(path), leaf) for k, (path, leaf) in zip(keys, leaves, strict=True)]
    )
    if cfg.tied:
        params["head"]["project"]["weight"] = params["embed"]["weight"]
    return params


def _random_leaf(key: jax.Array, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if len(leaf.shape) == 2:
        # embeddings have unit entries, projections keep the variance of their input
        return _noise(key, leaf, 1.0 if "embed" in path else leaf.shape[1] ** -0.5)
    noise = _noise(key, leaf, 0.1)
    return noise + jnp.ones((), leaf.dtype) if "norm" in path and "weight" in path else noise


def _noise(key: jax.Array, leaf: jax.ShapeDtypeStruct, deviation: float, count: tuple[int, ...] = ()) -> jax.Array:
    """Gives uniform noise of the given standard deviation."""
    edge = deviation * 3**0.5
    return jax.random.uniform(key, (*count, *leaf.shape), jnp.float32, -edge, edge).astype(leaf.dtype)


def random_experts(cfg: MoEConfig, key: jax.Array, moe_index: int) -> Expert:
    """Gives random experts of one layer at the model's own precision: a stack [E, ...] on the default device.

    Deterministic in ``(key, moe_index)``, so a store too large for the device can be made layer by layer.
    """
    leaves, tree = jax.tree.flatten(moe_experts.expert_spec(cfg))
    keys = jax.random.split(jax.random.fold_in(key, moe_index), len(leaves))
    deviations = [leaf.shape[-1] ** -0.5 if len(leaf.shape) == 2 else 0.1 for leaf in leaves]
    made = [_noise(k, leaf, d, (cfg.experts,)) for k, leaf, d in zip(keys, leaves, deviations, strict=True)]
    return jax.tree.unflatten(tree, made)


def random_stacks(cfg: MoEConfig, key: jax.Array) -> tuple[Expert, ...]:
    """Gives `random_experts` of every layer that has any."""
    return tuple(random_experts(cfg, key, index) for index in range(len(cfg.moe_layers)))
