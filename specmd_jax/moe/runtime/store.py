"""The experts of a model in pinned host memory, in the form that an engine copies them from.

A `PinnedStore` has each expert as arrays of its own, so that a copy to the device is a single DMA transfer; `pin` takes
them from anywhere (a checkpoint, stacks of a test, random numbers) one at a time, and beyond the store the host holds
one expert. It may hold every expert at several precisions, which miss rules choose from: level 1 is the fewest bits, as
in the simulator. A `StackedStore` has all experts in one array per matrix, or one per precision, so that a program can
pick one by number; `stack` takes one layer at a time. What a device keeps of either is the engines' business.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.checkpoint.folder import Checkpoint
from specmd_jax.moe.model import quant
from specmd_jax.moe.model.config import FLOATS, MoEConfig
from specmd_jax.moe.model.experts import Expert, expert_bytes, expert_spec
from specmd_jax.moe.model.random_weights import random_experts
from specmd_jax.moe.runtime.packing import Layout, Level, lay_out, pack
from specmd_jax.units import GIB

PINNED, DEVICE = "pinned_host", "device"


@dataclass(frozen=True)
class PinnedStore:
    """All routed experts of a model, each at Q precisions: ``levels[q][l][e]`` is an `Expert` of arrays in pinned host
    memory at ``precisions[q]``, by rising bits."""

    cfg: MoEConfig
    precisions: tuple[str, ...]  # [Q]
    levels: tuple[tuple[tuple[Expert, ...], ...], ...]  # [Q][L][E]
    level_bytes: tuple[int, ...]  # [Q] of one expert, scales and biases included

    @property
    def experts(self) -> tuple[tuple[Expert, ...], ...]:
        """[L][E] at the highest precision."""
        return self.levels[-1]

    @property
    def expert_bytes(self) -> int:
        """Of one expert at the highest precision."""
        return self.level_bytes[-1]

    @property
    def layers(self) -> int:
        """L, layers with routed experts."""
        return len(self.experts)

    @property
    def bytes(self) -> int:
        """Of all experts at all precisions."""
        return sum(self.level_bytes) * self.layers * self.cfg.experts

    @functools.cached_property
    def host_experts(self) -> tuple[Expert, ...]:
        """[L * E] at the highest precision as the host's processor can compute them: a second copy, made at the first
        use and kept.

        Raises SpecmdError if there is no room for it.
        """
        need, room = self.expert_bytes * self.layers * self.cfg.experts, weights.available_memory_bytes()
        if need > room:
            raise SpecmdError(
                f"{self.cfg.family}: a copy of the experts for the host's processor needs {need / GIB:.2f} GiB of host "
                f"memory, {room / GIB:.2f} GiB are free"
            )
        cpu = jax.local_devices(backend="cpu")[0]
        return tuple(
            jax.device_put(jax.tree.map(np.asarray, expert), cpu) for layer in self.experts for expert in layer
        )


def sharding(kind: str, device: Any = None) -> SingleDeviceSharding:
    """Says where arrays go: memory ``kind`` ("device" or "pinned_host") of ``device`` (None: the default one).

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
    precisions: Sequence[str] | None = None,
) -> PinnedStore:
    """Pins experts given layer by layer, expert by expert.

    Args:
        experts: L * E experts, leaves numpy or device arrays.
        precision, group: of the experts given; see `quant.matrix_spec`. None: the model's own.
        available_bytes: host memory that the store may take; None: what the system says is free.
        precisions: what to hold of each expert, by rising bits ("native": the model's own precision); the others are
            encoded from the one given. None: the experts as they are.
    Raises:
        SpecmdError: precisions out of order, or to be encoded from experts that are encoded already; the store does not
            fit, before the first expert is taken or when the runtime refuses to pin more; an expert of another shape
            or type; too few or too many experts.
    """
    given = precision or cfg.dtype
    names = level_names(cfg, given, precisions)
    spec, level_bytes = expert_spec(cfg, given, group), tuple(expert_bytes(cfg, name, group) for name in names)
    layers, count, size = len(cfg.moe_layers), len(cfg.moe_layers) * cfg.experts, sum(level_bytes)
    need = size * count
    _check_room(cfg, count, size, need, available_bytes)
    host = sharding(PINNED)
    pinned: list[tuple[Expert, ...]] = []
    for number, expert in enumerate(experts):
        if number == count:
            raise SpecmdError(f"{cfg.family}: more than the expected {layers} x {cfg.experts} experts")
        place = f"{cfg.family}: expert {number % cfg.experts} of MoE layer {number // cfg.experts}"
        _check_form(place, expert, spec, given)
        forms = tuple(expert if name == given else _encoded(expert, name, group) for name in names)
        try:
            pinned.append(jax.block_until_ready(jax.device_put(forms, host)))
        except jax.errors.JaxRuntimeError as error:
            done = len(pinned) * size / GIB
            raise _no_more(place, done, need, error) from None
    if len(pinned) < count:
        raise SpecmdError(f"{cfg.family}: {len(pinned)} experts, expected {layers} x {cfg.experts}")
    levels = tuple(
        tuple(tuple(forms[q] for forms in pinned[i : i + cfg.experts]) for i in range(0, count, cfg.experts))
        for q in range(len(names))
    )
    return PinnedStore(cfg, names, levels, level_bytes)


def level_names(cfg: MoEConfig, given: str, precisions: Sequence[str] | None) -> tuple[str, ...]:
    """Gives the precisions of a store of experts ``given`` at one of them; see `pin`."""
    if precisions is None:
        return (given,)
    names = tuple(cfg.dtype if name == "native" else name for name in precisions)
    for name in names:
        if name not in quant.BITS:
            raise unknown("precision", name, quant.BITS)
    bits = [quant.BITS[name] for name in names]
    if not names or not all(a < b for a, b in itertools.pairwise(bits)):
        raise SpecmdError(
            f"precisions {', '.join(names) or '(none)'}: expected ascending bits, such as int4, int8, {cfg.dtype}"
        )
    other = [name for name in names if name != given]
    if other and given not in FLOATS:
        raise SpecmdError(f"precisions: {other[0]} experts cannot be encoded from {given} ones")
    return names


def _encoded(expert: Expert, precision: str, group: int | None) -> Expert:
    return weights.quantize_expert(jax.tree.map(np.asarray, expert), precision, group)


def _check_room(cfg: MoEConfig, count: int, size: int, need: int, available_bytes: int | None) -> None:
    room = weights.available_memory_bytes() if available_bytes is None else available_bytes
    if need > room:
        raise SpecmdError(
            f"{cfg.family}: {count} experts of {size} bytes need {need / GIB:.2f} GiB of host memory, "
            f"{room / GIB:.2f} GiB are free"
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
        f"{place}: the runtime pins no more host memory after {done:.2f} of {need / GIB:.2f} GiB "
        f"(raise XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB): {str(error).splitlines()[0]}"
    )


def pin_stacks(cfg: MoEConfig, stacks: Iterable[Expert], **options: Any) -> PinnedStore:
    """Pins stacks [E, ...], one per MoE layer, such as `weights.load` and `random_stacks` give."""
    rows = (jax.tree.map(lambda leaf, e=e: leaf[e], stack) for stack in stacks for e in range(cfg.experts))
    return pin(cfg, rows, **options)


def pin_random(cfg: MoEConfig, key: jax.Array, **options: Any) -> PinnedStore:
    """Pins `random_experts`, layer by layer: the device holds one layer at a time."""
    return pin_stacks(cfg, (random_experts(cfg, key, index) for index in range(len(cfg.moe_layers))), **options)


def pin_checkpoint(
    checkpoint: Checkpoint,
    cfg: MoEConfig,
    precision: str | None = None,
    group: int | None = None,
    precisions: Sequence[str] | None = None,
) -> PinnedStore:
    """Pins experts straight from the shards of a checkpoint; every tensor is checked before the first is read."""
    weights.verify(checkpoint, cfg, precision)
    rows = (
        weights.read_expert(checkpoint, cfg, layer, expert, precision, group)
        for _, layer, expert in weights.iter_experts(cfg)
    )
    return pin(cfg, rows, precision, group, precisions=precisions)


@dataclass(frozen=True)
class StackedStore:
    """All routed experts of a model, each at Q precisions, in a few arrays in pinned host memory: MoE layer l expert e
    is row l * E + e of each.

    At one precision the only level is an `Expert` with leaves [L * E, ...] (`stack`); codes of encoded matrices are
    words (`quant.words`) where they can be. At several, a level is an array of pages [L * E, pages, words] uint32, as
    ``layout`` says.
    """

    cfg: MoEConfig
    precisions: tuple[str, ...]  # [Q] by rising bits
    levels: tuple[Any, ...]  # [Q]
    level_bytes: tuple[int, ...]  # [Q] of one expert, scales and biases included
    layout: Layout | None  # of the pages; None: one precision, no pages

    @property
    def stack(self) -> Expert:
        """All experts of a store of one precision. Raises SpecmdError if it has several."""
        if self.layout is not None:
            held = ", ".join(self.precisions)
            raise SpecmdError(f"{self.cfg.family}: experts at {held} lie in pages, expected one precision")
        return self.levels[0]

    @property
    def expert_bytes(self) -> int:
        """Of one expert at the highest precision."""
        return self.level_bytes[-1]

    @property
    def bytes(self) -> int:
        """Of all experts at all precisions, without what fills their last pages up."""
        return sum(self.level_bytes) * len(self.cfg.moe_layers) * self.cfg.experts


def stack(
    cfg: MoEConfig,
    stacks: Iterable[Expert],
    precision: str | None = None,
    group: int | None = None,
    available_bytes: int | None = None,
    precisions: Sequence[str] | None = None,
) -> StackedStore:
    """Gives a `StackedStore` of the experts given layer by layer as stacks [E, ...], leaves numpy or device arrays.

    All are gathered in ordinary memory first; then each array is pinned and its source given up, so that while this
    goes on the host holds the largest array twice.

    Args, Raises: as `pin`; a stack is refused where `pin` refuses an expert.
    """
    given = precision or cfg.dtype
    names = level_names(cfg, given, precisions)
    specs, given_spec = [expert_spec(cfg, name, group) for name in names], expert_spec(cfg, given, group)
    layout, held = None, specs
    if len(names) > 1:
        layout = lay_out(specs)
        held = [jax.ShapeDtypeStruct((level.pages, layout.page_words), np.uint32) for level in layout.levels]
    layers, count, size = len(cfg.moe_layers), len(cfg.moe_layers) * cfg.experts, quant.tree_bytes(held)
    largest = max(quant.tree_bytes(leaf) for leaf in jax.tree.leaves(held))
    _check_room(cfg, count, size, (size + largest) * count, available_bytes)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((cfg.experts, *leaf.shape), leaf.dtype), given_spec)
    whole = jax.tree.map(lambda leaf: np.zeros((count, *leaf.shape), leaf.dtype), held)
    done = 0
    for number, layer in enumerate(stacks):
        if number == layers:
            raise SpecmdError(f"{cfg.family}: more than the expected {layers} layers of experts")
        _check_form(f"{cfg.family}: the experts of MoE layer {number}", layer, spec, given)
        layer = jax.tree.map(np.asarray, layer)
        for at, name in enumerate(names):
            form = layer if name == given else _encoded_all(layer, name, group)
            _write(whole[at], number * cfg.experts, form, None if layout is None else layout.levels[at])
        done = number + 1
    if done < layers:
        raise SpecmdError(f"{cfg.family}: {done} layers of experts, expected {layers}")
    rest, tree = jax.tree.flatten(whole if layout else [_as_words(whole[0])])
    del whole
    host, pinned = sharding(PINNED), []
    while rest:
        try:
            pinned.append(jax.block_until_ready(jax.device_put(rest[0], host)))
        except jax.errors.JaxRuntimeError as error:
            so_far = sum(leaf.nbytes for leaf in pinned) / GIB
            raise _no_more(f"{cfg.family}: all experts", so_far, size * count, error) from None
        del rest[0]
    level_bytes = tuple(quant.tree_bytes(spec) for spec in specs)
    return StackedStore(cfg, names, tuple(jax.tree.unflatten(tree, pinned)), level_bytes, layout)


def _write(level: Any, first: int, stack: Expert, pages: Level | None) -> None:
    """Writes experts [n, ...] to rows first..first + n - 1 of a level of a `StackedStore` that is being gathered."""
    rows = slice(first, first + jax.tree.leaves(stack)[0].shape[0])
    if pages is not None:
        pack(pages, stack, level[rows])
        return
    for target, leaf in zip(jax.tree.leaves(level), jax.tree.leaves(stack), strict=True):
        target[rows] = leaf


def _encoded_all(stack: Expert, precision: str, group: int | None) -> Expert:
    """Gives the experts [n, ...] (numpy) of a stack at another precision."""
    experts = [jax.tree.map(lambda leaf, n=n: leaf[n], stack) for n in range(stack.down.shape[0])]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(_encoded(expert, precision, group) for expert in experts))


def _as_words(expert: Expert) -> Expert:
    """Gives an expert with its codes as words, not copied."""
    return expert._replace(gate_up=quant.words(expert.gate_up), down=quant.words(expert.down))


def stack_random(cfg: MoEConfig, key: jax.Array, **options: Any) -> StackedStore:
    """Stacks `random_experts`: the device holds one layer at a time."""
    return stack(cfg, (random_experts(cfg, key, index) for index in range(len(cfg.moe_layers))), **options)


def stack_checkpoint(
    checkpoint: Checkpoint,
    cfg: MoEConfig,
    precision: str | None = None,
    group: int | None = None,
    precisions: Sequence[str] | None = None,
) -> StackedStore:
    """Stacks experts straight from the shards of a checkpoint; every tensor is checked before the first is read."""
    weights.verify(checkpoint, cfg, precision)

    def layer(index: int) -> Expert:
        rows = [weights.read_expert(checkpoint, cfg, index, expert, precision, group) for expert in range(cfg.experts)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    return stack(cfg, (layer(index) for index in cfg.moe_layers), precision, group, precisions=precisions)
