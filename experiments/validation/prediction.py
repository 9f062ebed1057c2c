"""The time of a decoded token in closed form: section 5 of the contract, with the misses that an engine published.

Every layer is alike, nothing is prefetched, and the misses of a layer's K experts are drawn independently (a binomial
number of them, with the published mean). Attention over the context is left out: the contexts are short.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from experiments.validation.cells import Cell
from specmd_jax.specs.hardware import Hardware, hardware
from specmd_jax.specs.models import ModelSpec, model
from specmd_jax.trace.locality import locality_of, lru_hits
from specmd_jax.trace.synthetic import synthesize

LRU_TOKENS, LRU_SKIP, LRU_LAYERS = 1500, 300, 2  # of the synthetic routing that says what LRU misses


class Work(NamedTuple):
    """What a token asks of a machine, per layer; seconds are those of the machine alone."""

    layers: int
    top_k: int
    missing: float  # share of the K experts that are not resident
    miss: str  # fetch, cpu or split
    expert_bytes: int
    expert_s: float  # computation of one expert on the device
    dense_s: float  # dense part of one layer, without what its launches take
    head_s: float


def missing_of(cell: Cell, spec: ModelSpec) -> float:
    """Gives the share of a token's experts that are not resident, 0 to 1."""
    top_k = cell.top_k or spec.top_k
    if cell.misses_from == "resident":
        return 0.0
    if cell.misses_from == "hit rate":
        return 1 - (cell.hit_rate or 0.0)
    if cell.misses_from == "copies":
        return (cell.copies_per_token or 0.0) / (spec.layers * top_k)
    if cell.misses_from == "share":  # a set that is chosen without regard to use
        found = re.match(r"[\d.]+", cell.capacity)
        return 1 - float(found[0]) / 100 if found else 1.0
    return 1 - _lru(spec.name, spec.experts, top_k, cell.slots or 0)


@functools.cache
def _lru(name: str, experts: int, top_k: int, slots: int) -> float:
    """Gives the share of hits of LRU on synthetic routing that is as local as the model's."""
    knobs, _ = locality_of(name, experts, top_k)
    trace = synthesize(layers=LRU_LAYERS, experts=experts, top_k=top_k, tokens=LRU_TOKENS, **knobs._asdict())
    return lru_hits(trace, slots, LRU_SKIP)


def work_of(cell: Cell, machine: Hardware) -> Work:
    """Gives the work of a token of a cell that can be expressed."""
    spec = model(cell.model)
    if cell.dense_bits is not None:
        spec = spec.stored(dense_bits=cell.dense_bits, head_bits=cell.dense_bits)
    share = 1 / cell.ranks

    def seconds(flops: float, read: float) -> float:
        return max(flops / float(machine.peak_flops_per_s), read / float(machine.memory_bytes_per_s))

    size = cell.expert_bytes or 0
    launch = float(machine.launch_s)
    return Work(
        layers=spec.layers,
        top_k=cell.top_k or spec.top_k,
        missing=missing_of(cell, spec),
        miss=cell.miss,
        expert_bytes=size,
        expert_s=seconds(share * spec.expert_flops_per_token, size) + launch,
        dense_s=seconds(share * spec.dense_flops_per_token, share * spec.dense_bytes) + launch,
        head_s=seconds(share * spec.head_flops_per_token, share * spec.head_bytes),
    )


def token_seconds(work: Work, machine: Hardware) -> float:
    """Gives the seconds of a decoded token."""
    k, p = work.top_k, work.missing
    chances = [math.comb(k, m) * p**m * (1 - p) ** (k - m) for m in range(k + 1)]
    experts = sum(chance * _visit(work, machine, m) for m, chance in enumerate(chances))
    layer = experts + work.dense_s + float(machine.layer_s) + float(machine.sync_s)
    return work.layers * layer + work.head_s


def _visit(work: Work, machine: Hardware, misses: int) -> float:
    """Gives the seconds until the experts of a visit with so many misses are done."""
    if work.miss == "fetch" or misses == 0:
        return _with(work, machine, misses, 0)
    if work.miss == "cpu":
        return _with(work, machine, 0, misses)
    return min(_with(work, machine, copied, misses - copied) for copied in range(misses + 1))


def _with(work: Work, machine: Hardware, copied: int, on_host: int) -> float:
    """Gives the same for so many misses copied, and so many computed by the host."""
    size, host = work.expert_bytes, float(machine.host_bytes_per_s)
    copy_s = float(machine.link_latency_s) + size / float(machine.link_bytes_per_s)
    host_s = size / min(float(machine.host_moe_bytes_per_s), host)
    link, worked = copied * copy_s, on_host * host_s
    slow = max(0.0, size / copy_s / host + size / host_s / host - 1) * min(link, worked)
    resident, on_device = work.top_k - copied - on_host, work.top_k - on_host
    arrived = link + (slow if copied else 0.0)
    done = worked + slow + float(machine.handover_s) if on_host else 0.0
    # copies are slower than computation, or the last expert waits for the device
    device = resident * work.expert_s
    for copy in range(1, copied + 1):
        device = max(device, arrived * copy / copied) + work.expert_s
    added = max(arrived, done) + on_device * work.expert_s
    overlaps = float(machine.overlaps)
    return overlaps * max(device, done) + (1 - overlaps) * added


def machine_of(cell: Cell) -> Hardware:
    """Gives the machine of a cell as shipped, with the rates that were published."""
    return hardware(cell.hardware)
