"""What a running model takes of the device's memory, worked out from its shapes before any weight is read.

An engine says what it keeps beside the cache's experts (`Beside`); `slots_for` gives the rest of the memory to the
cache. Weights, keys and values are exact. The work of a pass is an upper estimate of what a program holds while a
prompt goes through attention and its experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params, init_cache, param_spec
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.units import MIB

LIBRARY_BYTES = 256 * MIB
"""Kept free on an accelerator for workspaces of its libraries and for gaps between arrays."""

_WIDE = 4  # bytes of the float32 that attention and experts compute in


class Beside(NamedTuple):
    """What an engine keeps on the device beside the experts of the cache."""

    dense_bytes: int  # all weights but those of routed experts, as often as the engine holds them
    cache_bytes: int  # keys and values of every position
    record_bytes: int  # what passes leave behind until the run ends
    work_bytes: int  # what a pass computes with
    experts: int  # places for experts beside the capacity

    def bytes(self, expert_bytes: int) -> int:
        """Gives all of it, with experts of so many bytes."""
        return sum(self[:4]) + self.experts * expert_bytes


def dense_spec(cfg: MoEConfig) -> Params:
    """Gives shapes and types of the dense weights that a device holds; a head that is the embedding is not counted."""
    spec = param_spec(cfg)
    if cfg.tied:
        del spec["head"]["project"]["weight"]
    return spec


def cache_bytes(cfg: MoEConfig, positions: int) -> int:
    """Gives the exact bytes of keys and values of one sequence."""
    return tree_bytes(jax.eval_shape(lambda: init_cache(cfg, 1, positions)))


def work_bytes(cfg: MoEConfig, tokens: int, positions: int) -> int:
    """Gives what a pass of ``tokens`` over ``positions`` computes with, at most: the scores of one layer's attention
    three times over, the streams between its parts, every (token, choice) pair's output twice, and the logits. On an
    accelerator `LIBRARY_BYTES` come on top."""
    scores = 3 * cfg.heads * tokens * positions
    streams = tokens * (6 * cfg.width + 2 * (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim)
    streams += 3 * tokens * max(cfg.dense_width, cfg.shared_width)
    pairs = 2 * tokens * cfg.top_k * cfg.width + 3 * min(128, tokens * cfg.top_k) * cfg.expert_width
    own = 0 if jax.default_backend() == "cpu" else LIBRARY_BYTES
    return _WIDE * (scores + streams + pairs + 2 * cfg.vocabulary) + own


def slots_for(memory_bytes: int, beside: Beside, expert_bytes: int, experts: int) -> int:
    """Gives how many experts a cache holds, at most all ``experts``, if everything takes ``memory_bytes``.

    Raises:
        SpecmdError: not one expert fits; says what is needed at least.
    """
    slots = (memory_bytes - beside.bytes(expert_bytes)) // expert_bytes
    if slots < 1:
        least_mib = math.ceil(10 * (beside.bytes(expert_bytes) + expert_bytes) / MIB) / 10
        raise SpecmdError(
            f"memory of {memory_bytes / MIB:.1f} MiB is too little: expected at least {least_mib:.1f} MiB "
            f"(dense weights {beside.dense_bytes / MIB:.1f}, keys and values {beside.cache_bytes / MIB:.1f}, work "
            f"{(beside.work_bytes + beside.record_bytes) / MIB:.1f}, {beside.experts + 1} experts of "
            f"{expert_bytes / MIB:.2f})"
        )
    return min(slots, experts)


def device_bytes() -> int | None:
    """Gives what the runtime may take of the default device's memory; None where it does not say, as on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")
