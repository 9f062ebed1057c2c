"""The experts of a model in pinned host memory, in the form that an engine copies them from.

A `PinnedStore` has each expert as arrays of its own, so that a copy to the device is a single DMA transfer; `pin` takes
them from anywhere (a checkpoint, stacks of a test, random numbers) one at a time, and beyond the store the host holds
one expert. A `StackedStore` has all experts in one array a matrix, so that a program can pick one by number; `stack`
takes a layer at a time. What a device keeps of either is the engines' business (`offload`, `fused`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from specmd_jax.errors import SpecmdError
from specmd_jax.moe import quant, weights
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
    size, spec = expert_bytes(cfg, precision, group), expert_spec(cfg, precision, group)
    layers, count = len(cfg.moe_layers), len(cfg.moe_layers) * cfg.experts
    need = size * count
    _check_room(cfg, count, size, need, available_bytes)
    host = sharding(PINNED)
    pinned: list[Expert] = []
    for number, expert in enumerate(experts):
        if number == count:
            raise SpecmdError(f"{cfg.family}: more than the expected {layers} x {cfg.experts} experts")
        place = f"{cfg.family}: expert {number % cfg.experts} of MoE layer {number // cfg.experts}"
        _check_form(place, expert, spec, precision or cfg.dtype)
        try:
            pinned.append(jax.block_until_ready(jax.device_put(expert, host)))
        except jax.errors.JaxRuntimeError as error:
            done = len(pinned) * size / 1e9
            raise _no_more(place, done, need, error) from None
    if len(pinned) < count:
        raise SpecmdError(f"{cfg.family}: {len(pinned)} experts, expected {layers} x {cfg.experts}")
    rows = tuple(tuple(pinned[i : i + cfg.experts]) for i in range(0, count, cfg.experts))
    return PinnedStore(cfg, rows, size)


def _check_room(cfg: MoEConfig, count: int, size: int, need: int, available_bytes: int | None) -> None:
    room = weights.available_memory_bytes() if available_bytes is None else available_bytes
    if need > room:
        raise SpecmdError(
            f"{cfg.family}: {count} experts of {size} bytes need {need / 1e9:.2f} GB of host memory, "
            f"{room / 1e9:.2f} GB are free"
        )


def _check_form(place: str, expert: Expert, spec: Expert, precision: str) -> None:
    if jax.tree.structure(expert) != jax.tree.structure(spec):
        raise SpecmdError(f"{place}: its parts are not those of a {precision} expert")
    for leaf, wanted in zip(jax.tree.leaves(expert), jax.tree.leaves(spec), strict=True):
        if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
            raise SpecmdError(
                f"{place} is {leaf.dtype} {list(leaf.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
            )


def _no_more(place: str, done: float, need: float, error: Exception) -> SpecmdError:
    return SpecmdError(
        f"{place}: the runtime pins no more host memory after {done:.2f} of {need / 1e9:.2f} GB "
        f"(raise XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB): {str(error).splitlines()[0]}"
    )


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


@dataclass(frozen=True)
class StackedStore:
    """All routed experts of a model as one `Expert` with leaves [L * E, ...] in pinned host memory."""

    cfg: MoEConfig
    stack: Expert  # of MoE layer l expert e: row l * E + e
    expert_bytes: int  # of one expert, scales and biases included

    @property
    def bytes(self) -> int:
        """Of all experts."""
        return self.expert_bytes * len(self.cfg.moe_layers) * self.cfg.experts


def stack(
    cfg: MoEConfig,
    stacks: Iterable[Expert],
    precision: str | None = None,
    group: int | None = None,
    available_bytes: int | None = None,
) -> StackedStore:
    """A `StackedStore` of the experts given layer by layer as stacks [E, ...], leaves numpy or device arrays.

    All are gathered in ordinary memory first; then each matrix's array is pinned and its source given up, so that
    while this goes on the host holds the largest array twice.

    Args, Raises: as `pin`; a stack is refused where `pin` refuses an expert.
    """
    size, one = expert_bytes(cfg, precision, group), expert_spec(cfg, precision, group)
    layers, count = len(cfg.moe_layers), len(cfg.moe_layers) * cfg.experts
    largest = max(quant.tree_bytes(leaf) for leaf in jax.tree.leaves(one))
    _check_room(cfg, count, size, (size + largest) * count, available_bytes)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((cfg.experts, *leaf.shape), leaf.dtype), one)
    whole = [np.empty((count, *leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(one)]
    done = 0
    for number, layer in enumerate(stacks):
        if number == layers:
            raise SpecmdError(f"{cfg.family}: more than the expected {layers} layers of experts")
        _check_form(f"{cfg.family}: the experts of MoE layer {number}", layer, spec, precision or cfg.dtype)
        for target, leaf in zip(whole, jax.tree.leaves(layer), strict=True):
            target[number * cfg.experts : (number + 1) * cfg.experts] = np.asarray(leaf)
        done = number + 1
    if done < layers:
        raise SpecmdError(f"{cfg.family}: {done} layers of experts, expected {layers}")
    host, pinned = sharding(PINNED), []
    while whole:
        try:
            pinned.append(jax.block_until_ready(jax.device_put(whole[0], host)))
        except jax.errors.JaxRuntimeError as error:
            held = sum(leaf.nbytes for leaf in pinned) / 1e9
            raise _no_more(f"{cfg.family}: all experts", held, size * count, error) from None
        del whole[0]
    return StackedStore(cfg, jax.tree.unflatten(jax.tree.structure(one), pinned), size)


def stack_random(cfg: MoEConfig, key: jax.Array, **options: Any) -> StackedStore:
    """`stack` of `random_experts`: the device holds one layer at a time."""
    return stack(cfg, (random_experts(cfg, key, index) for index in range(len(cfg.moe_layers))), **options)


def stack_checkpoint(
    checkpoint: weights.Checkpoint, cfg: MoEConfig, precision: str | None = None, group: int | None = None
) -> StackedStore:
    """`stack` straight from the shards of a checkpoint; every tensor is checked before the first is read."""
    weights.verify(checkpoint, cfg, precision)

    def layer(index: int) -> Expert:
        rows = [weights.read_expert(checkpoint, cfg, index, expert, precision, group) for expert in range(cfg.experts)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    return stack(cfg, (layer(index) for index in cfg.moe_layers), precision, group)
