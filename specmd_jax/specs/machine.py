"""`Hardware`: the numbers of one machine, where they come from, and what each may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

import flax.struct
import numpy as np

from specmd_jax.errors import SpecmdError, unknown

Evidence: TypeAlias = Literal["measured", "nominal", "estimated"]
EVIDENCE: tuple[str, ...] = get_args(Evidence)


class Hardware(flax.struct.PyTreeNode):
    """Rates and overheads of one machine. Every field is a leaf, so a study can `vmap` over any of them.

    Rates may be infinite and overheads zero: times are ``overhead + amount / rate``, so all stay finite. In the preset
    ``infinite`` only the link and the launches are free; what remains is the device's computation. The constructor
    checks nothing, because fields may be traced arrays; `hardware` does.
    """

    link_bytes_per_s: float  # host memory (or storage) to device
    link_latency_s: float  # before the first byte of a copy
    peak_flops_per_s: float  # device, 16-bit matrix multiplication, dense
    memory_bytes_per_s: float  # device memory
    launch_s: float  # overhead of one expert, and of the dense part of one layer
    host_flops_per_s: float  # for experts that run on the CPU
    host_bytes_per_s: float  # host memory, which copies over the link and experts on the host share
    host_moe_bytes_per_s: float = math.inf  # at which the host's expert kernels read, if that is less than its memory
    handover_s: float = 0.0  # of a visit with experts on the host: to the host and back
    sync_s: float = 0.0  # by which the engine prolongs every layer as it waits for the device
    layer_s: float = 0.0  # launches of a layer, whatever the number of its experts
    overlaps: float = 1.0  # 1: residents compute while others are copied; 0: when all are there; or in between
    storage_bytes_per_s: float = math.inf  # storage to host memory, where host memory does not hold everything
    storage_latency_s: float = 0.0  # before the first byte of a read


RATES = (
    "link_bytes_per_s",
    "peak_flops_per_s",
    "memory_bytes_per_s",
    "host_flops_per_s",
    "host_bytes_per_s",
    "host_moe_bytes_per_s",
    "storage_bytes_per_s",
)
OVERHEADS = ("link_latency_s", "launch_s", "handover_s", "sync_s", "layer_s", "storage_latency_s")
SHARES = ("overlaps",)


@dataclass(frozen=True)
class HardwareNotes:
    """Where a preset's numbers come from."""

    source: str
    evidence: Mapping[str, Evidence] = field(default_factory=dict)  # field of `Hardware` -> how it is known


def items_of(machine: Hardware) -> Iterator[tuple[str, Any]]:
    """Gives each field and its value."""
    return ((leaf.name, getattr(machine, leaf.name)) for leaf in fields(machine))


def check_machine(machine: Hardware, place: str) -> None:
    """Raises `SpecmdError` naming `place` and the field whose number cannot be."""
    for name, value in items_of(machine):
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "iuf":
            raise SpecmdError(f"{place}: {name} is {value!r}: expected a number")
        good, expected = numbers > 0, "a positive rate"  # NaN is neither
        if name in OVERHEADS:
            good, expected = (numbers >= 0) & np.isfinite(numbers), "a finite time of at least 0 seconds"
        elif name in SHARES:
            good, expected = (numbers >= 0) & (numbers <= 1), "a share, 0 to 1"
        if not good.all():
            raise SpecmdError(f"{place}: {name} is {numbers[~good].flat[0]}: expected {expected}")


def check_notes(notes: HardwareNotes, place: str) -> None:
    """Raises `SpecmdError` naming `place` if the notes speak of a field, or in a word, that is not known."""
    names = [leaf.name for leaf in fields(Hardware)]
    for name, kind in notes.evidence.items():
        if name not in names:
            raise unknown(f"field in the evidence of {place}:", name, names)
        if kind not in EVIDENCE:
            raise SpecmdError(f"{place}: evidence of {name} is {kind!r}: expected one of {', '.join(EVIDENCE)}")
