"""What shares the memory of a device: the weights beside the experts, keys and values, workspace, and what is left."""

from __future__ import annotations

from typing import NamedTuple

from specmd_jax.errors import SpecmdError
from specmd_jax.specs.models import ModelSpec
from specmd_jax.units import GIB, MIB

WORKSPACE_BYTES = 512 * MIB
"""Assumed for what no configuration says: the driver's context, the libraries' buffers, the activations of a pass."""


class Part(NamedTuple):
    """One named part of the memory."""

    name: str
    bytes: int
    assumed: str = ""  # why the number is assumed rather than published; empty: it is published


class MemoryShare(NamedTuple):
    """How a device's memory is shared."""

    spec: ModelSpec  # with the bits at which it is stored
    memory_bytes: int
    parts: tuple[Part, ...]  # everything but routed experts

    @property
    def fixed_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def left_bytes(self) -> int:
        """Bytes left for routed experts; more than all of them is not cut."""
        return self.memory_bytes - self.fixed_bytes

    @property
    def experts(self) -> int:
        """Routed experts, of all layers together, that fit into what is left, at most all."""
        return min(self.left_bytes // self.spec.expert_bytes, self.spec.layers * self.spec.experts)

    @property
    def assumed(self) -> tuple[Part, ...]:
        """The parts whose bytes are assumed."""
        return tuple(part for part in self.parts if part.assumed)


def share_memory(
    spec: ModelSpec,
    memory_bytes: int,
    *,
    bits: float | None = None,
    context: int = 0,
    batch: int = 1,
    workspace_bytes: int | None = None,
    dense_bits: float | None = None,
    head_bits: float | None = None,
    embed_bits: float | None = None,
    kv_bits: float | None = None,
) -> MemoryShare:
    """Gives the parts of a device's memory that are not for routed experts, and with them what is left.

    Args:
      memory_bytes: of the device.
      bits: of an expert's weight, scales included; None: as published. What it means for the rest: `ModelSpec.stored`.
      context: tokens of each sequence that keys and values are kept for.
      batch: sequences at a time.
      workspace_bytes: None: `WORKSPACE_BYTES`, marked as assumed.
      dense_bits, head_bits, embed_bits: of weights besides the experts; None: `ModelSpec.stored` says what is assumed.
      kv_bits: of a key or value; None: the spec's, assumed to be 16.

    Raises:
      SpecmdError: keys and values that exceed the memory, or a memory that holds not one expert besides the parts.
    """
    for name, value, least in (
        ("memory_bytes", memory_bytes, 1),
        ("context", context, 0),
        ("batch", batch, 1),
        ("workspace_bytes", 0 if workspace_bytes is None else workspace_bytes, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpecmdError(f"{name} is {value!r}, expected a whole number of at least {least}")
    stored = spec.stored(bits, dense_bits=dense_bits, head_bits=head_bits, embed_bits=embed_bits, kv_bits=kv_bits)
    kv_bytes = round(batch * stored.kv_bytes(context)) if context else 0
    if kv_bytes > memory_bytes:
        each = f" of {batch} sequences" if batch > 1 else ""
        raise SpecmdError(
            f"keys and values of a context of {context} tokens{each} take {kv_bytes / GIB:.2f} GiB, the memory is "
            f"{memory_bytes / GIB:.2f} GiB: expected at most {_fitting(stored, memory_bytes // batch)} tokens"
        )

    def weights(name: str, size: float, before: float, now: float, given: float | None) -> Part:
        moved = given is None and now != before
        return Part(name, round(size), f"{now:g} bits a weight, as the experts" if moved else "")

    parts = (
        weights("dense layers", stored.layers * stored.dense_bytes, spec.dense_bits, stored.dense_bits, dense_bits),
        weights("head", stored.head_bytes, spec.head_bits, stored.head_bits, head_bits),
        weights("embedding", stored.embed_bytes, spec.embed_bits, stored.embed_bits, embed_bits),
        Part(
            "keys and values",
            kv_bytes,
            f"{stored.kv_bits:g} bits a key or value" if context and kv_bits is None else "",
        ),
        Part(
            "workspace",
            WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
            "driver, libraries and activations" if workspace_bytes is None else "",
        ),
    )
    found = MemoryShare(stored, memory_bytes, parts)
    if found.left_bytes < stored.expert_bytes:
        listed = " + ".join(f"{part.name} {part.bytes / GIB:.2f}" for part in parts)
        least = (found.fixed_bytes + stored.expert_bytes) / GIB
        raise SpecmdError(
            f"memory of {memory_bytes / GIB:.2f} GiB holds no expert of {spec.name} beside {listed} GiB: "
            f"expected at least {least:.2f} GiB"
        )
    return found


def _fitting(spec: ModelSpec, size: int) -> int:
    """Gives the longest context whose keys and values take at most so many bytes."""
    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spec.kv_bytes(middle) <= size else (low, middle - 1)
    return low
