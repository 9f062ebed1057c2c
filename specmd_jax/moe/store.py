"""The experts of a model in host memory, each one pinned once, so that a copy to the device is a single DMA transfer.

`pin` takes experts from anywhere (a checkpoint, stacks of a test, random numbers) one at a time; beyond the store the
host holds one expert. What a device keeps of it is `specmd_jax.moe.offload`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from specmd_jax.errors import SpecmdError
from specmd_jax.moe import weights
from specmd_jax.moe.config import MoEConfig
from specmd_jax.moe.experts import Expert, expert_bytes, expert_spec
from specmd_jax.moe.model import random_experts

PINNED, DEVICE = "pinned_host", "device"


@dataclass(frozen=True)
class PinnedStore:
    """All routed experts of a model: ``experts[l][e]`` is an `Expert` of arrays in pinned host memory."""

    cfg: MoEConfig
    experts: tuple[tuple[Expert, ...], ...]  # [L][E]
    expert_bytes: int  # of one expert, scales and biases included

    @property
    def layers(self) -> int:
        """L, layers with routed experts."""
        return len(self.experts)

    @property
    def bytes(self) -> int:
        """Of all experts."""
        return self.expert_bytes * len(self.experts) * self.cfg.experts


def sharding(kind: str, device: Any = None) -> SingleDeviceSharding:
    """Where arrays go: memory ``kind`` ("device" or "pinned_host") of ``device`` (None: the default one).

    Raises SpecmdError where the device has no such memory.
    """
    device = jax.devices()[0] if device is None else device
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise SpecmdError(f"{device}: no {kind} memory (has {', '.join(kinds)}): experts cannot be kept beside it")
    return SingleDeviceSharding(device, memory_kind=kind)


def pin(
    cfg: MoEConfig,
    experts: Iterable[Expert],
    precision: str | None = None,
    group: int | None = None,
    available_bytes: int | None = None,
) -> PinnedStore:
    """Pins experts given layer by layer, expert by expert.

    Args:
        experts: L * E experts, leaves numpy or device arrays.
        precision, group: of the experts given; see `quant.matrix_spec`.
        available_bytes: host memory that the store may take; None: what the system says is free.
    Raises:
        SpecmdError: the store does not fit, before the first expert is taken or when the runtime refuses to pin more;
            an expert of another shape or type; too few or too many experts.
    """
    size = expert_bytes(cfg, precision, group)
    layers, spec = len(cfg.moe_layers), expert_spec(cfg, precision, group)
    need, count = size * layers * cfg.experts, layers * cfg.experts
    room = weights.available_memory_bytes() if available_bytes is None else available_bytes
    if need > room:
        raise SpecmdError(
            f"{cfg.family}: {count} experts of {size} bytes need {need / 1e9:.2f} GB of host memory, "
            f"{room / 1e9:.2f} GB are free"
        )
    host = sharding(PINNED)
    pinned: list[Expert] = []
    for number, expert in enumerate(experts):
        if number == count:
            raise SpecmdError(f"{cfg.family}: more than the expected {layers} x {cfg.experts} experts")
        place = f"{cfg.family}: expert {number % cfg.experts} of MoE layer {number // cfg.experts}"
        if jax.tree.structure(expert) != jax.tree.structure(spec):
            raise SpecmdError(f"{place}: its parts are not those of a {precision or cfg.dtype} expert")
        for leaf, wanted in zip(jax.tree.leaves(expert), jax.tree.leaves(spec), strict=True):
            if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
                raise SpecmdError(
                    f"{place} is {leaf.dtype} {list(leaf.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
                )
        try:
            pinned.append(jax.block_until_ready(jax.device_put(expert, host)))
        except jax.errors.JaxRuntimeError as error:
            done = len(pinned) * size / 1e9
            raise SpecmdError(
                f"{place}: the runtime pins no more host memory after {done:.2f} of {need / 1e9:.2f} GB "
                f"(raise XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB): {str(error).splitlines()[0]}"
            ) from None
    if len(pinned) < count:
        raise SpecmdError(f"{cfg.family}: {len(pinned)} experts, expected {layers} x {cfg.experts}")
    rows = tuple(tuple(pinned[i : i + cfg.experts]) for i in range(0, count, cfg.experts))
    return PinnedStore(cfg, rows, size)


def pin_stacks(cfg: MoEConfig, stacks: Iterable[Expert], **options: Any) -> PinnedStore:
    """`pin` of stacks [E, ...], one a MoE layer, such as `weights.load` and `random_stacks` give."""
    rows = (jax.tree.map(lambda leaf, e=e: leaf[e], stack) for stack in stacks for e in range(cfg.experts))
    return pin(cfg, rows, **options)


def pin_random(cfg: MoEConfig, key: jax.Array, **options: Any) -> PinnedStore:
    """`pin` of `random_experts`, layer by layer: the device holds one layer at a time."""
    return pin_stacks(cfg, (random_experts(cfg, key, index) for index in range(len(cfg.moe_layers))), **options)


def pin_checkpoint(
    checkpoint: weights.Checkpoint, cfg: MoEConfig, precision: str | None = None, group: int | None = None
) -> PinnedStore:
    """`pin` straight from the shards of a checkpoint; every tensor is checked before the first is read."""
    weights.verify(checkpoint, cfg, precision)
    rows = (
        weights.read_expert(checkpoint, cfg, layer, expert, precision, group)
        for _, layer, expert in weights.iter_experts(cfg)
    )
    return pin(cfg, rows, precision, group)
