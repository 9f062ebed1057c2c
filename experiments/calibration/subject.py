"""The model whose parts `experiments.calibrate` times: a shape with few of its layers and made-up weights."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax import moe
from specmd_jax.moe.fused.arrays import Kernels
from specmd_jax.moe.fused.engine import NO_KERNELS, PARTS, why_not
from specmd_jax.moe.kernels import decode
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.forward import Net, Params
from specmd_jax.moe.runtime.policy import Policy, make_policy
from specmd_jax.moe.runtime.store import DEVICE, StackedStore, sharding, stack_random


class Subject(NamedTuple):
    """A model with its experts in pinned host memory, and how the fused engine runs it here."""

    name: str
    whole: MoEConfig  # as published
    cfg: MoEConfig  # with a few layers
    params: Params
    store: StackedStore
    policy: Policy  # the cache's, when visits miss
    kernels: Kernels

    @property
    def layers(self) -> int:
        """L, layers with routed experts that were made."""
        return len(self.cfg.moe_layers)

    @property
    def host(self) -> Expert:
        """The host's stack, leaves [L * E, ...], where its readers can read it: interpreted kernels take arrays of one
        memory only."""
        here = self.kernels.experts and self.kernels.interpret
        return jax.device_put(self.store.stack, sharding(DEVICE)) if here else self.store.stack

    def net(self, tokens: int) -> Net:
        """Gives the model's functions for a pass of so many tokens."""
        if tokens == 1 and self.kernels.dense:
            return decode.net(self.cfg, self.kernels.interpret)
        return moe.build(self.cfg)

    def slots(self) -> Expert:
        """Gives slots that hold every expert, that of row n in slot n, and spare ones behind them."""
        spare = max(self.cfg.top_k, 2)
        return jax.tree.map(
            lambda leaf: jnp.pad(jax.device_put(leaf, sharding(DEVICE)), ((0, spare), *((0, 0),) * (leaf.ndim - 1))),
            self.store.stack,
        )


def model_config(name: str) -> MoEConfig:
    """Gives the tiny model of the smoke runs, or a published shape."""
    return moe.tiny("olmoe", "float32") if name == "tiny" else moe.published(name)


def few_layers(cfg: MoEConfig, layers: int) -> MoEConfig:
    """Gives the same model with so many layers with routed experts at most, those before them included."""
    layers = min(layers, len(cfg.moe_layers))
    kept = cfg.moe_layers[layers - 1] + 1
    return dataclasses.replace(cfg, layers=kept, windows=cfg.windows[:kept], moe_layers=cfg.moe_layers[:layers])


def make_subject(name: str, whole: MoEConfig, cfg: MoEConfig, capacity: str, kernels: bool | None = None) -> Subject:
    """Makes the weights of ``cfg``, which is ``whole`` with fewer layers.

    Args:
        capacity: of the cache whose policy is timed.
        kernels: as for `Fused`.
    Raises:
        SpecmdError: the host or the runtime has no room for the experts; the capacity holds not one.
    """
    policy = make_policy(cfg, moe.expert_bytes(cfg), eviction="lru", capacity=capacity)
    key, gpu = jax.random.key(0), jax.default_backend() == "gpu"
    store = stack_random(cfg, key)
    reasons = why_not(cfg, policy, store.stack) if kernels or (gpu and kernels is None) else NO_KERNELS
    used = Kernels(*(part not in reasons for part in PARTS), interpret=not gpu)
    params = jax.jit(moe.random_params, static_argnums=0)(cfg, key)
    return Subject(name, whole, cfg, params, store, policy, used)
