"""The queue of what is foreseen: what of it starts before the next gate, as far as there is room (CONTRACT.md sections
4 and 6). It serves copies to the device, which may have to be read first, and reads that go no further.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int8, Int32

from specmd_jax.loops import anywhere
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.state import Cell, Flight, Numbers


class Behind(NamedTuple):
    """What the copies that have started did to the tier behind them."""

    read: Bool[Array, "H E"]  # were read first
    storage_s: Float32[Array, ""]  # seconds from the gate until the storage link is free
    copying_s: Float32[Array, ""]  # that the host link copies them
    pinned: Int32[Array, " L"]  # units of host memory
    used: Int32[Array, " L"]


class Queue(NamedTuple):
    """The wanted copies, or reads, and those that have started."""

    wanted: Float32[Array, "H E"]  # want-score, -inf: not, or no longer
    started: Int32[Array, "H E"]  # 1, 2, ... in the order of starting; 0: not
    pinned: Int32[Array, " L"]  # units
    used: Int32[Array, " L"]  # units
    flight: Flight
    behind: Behind | None = None  # with a host tier
    skipped: Bool[Array, "H E"] | None = None  # had time and no room; None: nobody asks


def serve_in_turn(
    cell: Cell,
    rows: Int32[Array, " H"],
    starts: Callable[[Float32[Array, ""]], Bool[Array, ""]],
    queue: Queue,
    absent: Bool[Array, "H E"] | None = None,
    copied_s: Callable[[Float32[Array, ""], Float32[Array, ""]], Float32[Array, ""]] | None = None,
) -> Queue:
    """Starts the wanted copies, or reads, one after the other, as far as time and room allow.

    Args:
      rows: their layers.
      starts: whether a copy that comes after so many seconds of the link's work starts before the next gate.
      absent: those that storage has to be read for, where there is a host tier.
      copied_s: as for `prefetch`.
    """
    setup, _, numbers = cell
    top = numbers.units.shape[0] - 1
    flat = jnp.arange(setup.horizon * setup.experts, dtype=jnp.int32).reshape(setup.horizon, setup.experts)

    def serve(queue: Queue) -> Queue:
        most = jnp.max(queue.wanted)
        index = jnp.min(jnp.where(queue.wanted == most, flat, flat.size - 1))  # of equals: nearer layer, lower id
        row = rows[index // setup.experts]
        units = numbers.units[top, row]
        in_time = starts(queue.flight.link_s) if setup.timed else jnp.asarray(True)
        fits = has_room(numbers, queue.pinned, row, units)
        if not setup.may_evict:
            fits &= has_room(numbers, queue.used, row, units)
        go, start_s, behind = (most > NO) & in_time & fits, queue.flight.link_s, None
        if queue.behind is not None and absent is not None:
            away = jnp.any(absent & (flat == index))
            if cell.policies.miss.hosts and setup.timed:  # storage may still read what the host is to run
                start_s = jnp.where(away, jnp.maximum(start_s, queue.behind.storage_s), start_s)
                go &= starts(start_s)
            go, start_s, behind = _read_first(cell, queue.behind, row, away, go, start_s)
            behind = behind._replace(read=behind.read | (absent & (flat == index) & go))
        taken = jnp.where((jnp.arange(setup.layers) == row) & go, units, 0)
        copy_s = numbers.costs.copy_s[top - 1, row] if numbers.costs is not None else jnp.float32(0)
        end_s = start_s + jnp.where(go, copy_s, 0.0)
        if copied_s is not None:
            end_s = jnp.where(go, copied_s(start_s, copy_s), queue.flight.link_s)
        if behind is not None:
            behind = behind._replace(copying_s=behind.copying_s + jnp.where(go, end_s - start_s, 0.0))
        skipped = queue.skipped
        if skipped is not None:
            skipped |= (flat == index) & (most > NO) & in_time & ~fits
        # masks, not writes at an index: under vmap those would be loops over the batch
        return Queue(
            wanted=jnp.where((flat != index) & in_time, queue.wanted, NO),
            started=jnp.where((flat == index) & go, jnp.max(queue.started) + 1, queue.started),
            pinned=queue.pinned + taken,
            used=queue.used + taken,
            flight=queue.flight._replace(
                link_s=end_s,
                expert=jnp.where(go, row * setup.experts + index % setup.experts, queue.flight.expert),
            ),
            behind=behind,
            skipped=skipped,
        )

    return jax.lax.while_loop(lambda queue: anywhere(jnp.any(queue.wanted > NO)), serve, queue)


def has_room(
    numbers: Numbers, held: Int32[Array, " L"], row: Int32[Array, ""], extra: Int32[Array, ""]
) -> Bool[Array, ""]:
    """Whether a layer's pool, of whose units `held` [L] are taken, has room for some more."""
    return (jnp.sum(held) if numbers.pooled else held[row]) + extra <= numbers.budget_of(row)


def pinned_units(
    numbers: Numbers,
    flight: Flight,
    layer: Int32[Array, ""],
    demand: Bool[Array, " E"],
    demand_units: Int32[Array, ""],
    level: Int8[Array, "L E"],
) -> Int32[Array, " L"]:
    """Gives what the pinned demand of a layer and the copy in flight hold in each layer."""
    experts = demand.shape[0]
    flight_layer, expert = flight.expert // experts, flight.expert % experts
    in_flight = (flight.link_s > 0) & (flight.expert >= 0)
    apart = in_flight & ~((flight_layer == layer) & demand[expert])
    held = jnp.where(apart, numbers.units[level[flight_layer, expert].astype(jnp.int32), flight_layer], 0)
    layers = jnp.arange(level.shape[0])
    return jnp.where(layers == layer, demand_units, 0) + jnp.where(layers == flight_layer, held, 0)


def _read_first(
    cell: Cell,
    behind: Behind,
    row: Int32[Array, ""],
    absent: Bool[Array, ""],
    go: Bool[Array, ""],
    link_s: Float32[Array, ""],
) -> tuple[Bool[Array, ""], Float32[Array, ""], Behind]:
    """Lets a prefetch copy of an expert of layer `row` wait for its read, if it is `absent` from host memory.

    Where the host link is free, at `link_s`, storage is free.

    Returns:
      Whether it starts, when its copy does, and the tier behind it.
    """
    setup, numbers = cell.setup, cell.numbers.of_host()
    assert setup.tier is not None
    units = numbers.units[1, row]
    reads = absent & go
    if not setup.tier.exclusive:
        reads &= has_room(numbers, behind.pinned, row, units)
        if not setup.may_evict:
            reads &= has_room(numbers, behind.used, row, units)
    go &= reads | ~absent
    read_s = jnp.float32(0) if numbers.costs is None or numbers.costs.read_s is None else numbers.costs.read_s[row]
    here = jnp.arange(setup.layers) == row
    held = not setup.tier.exclusive
    behind = behind._replace(
        storage_s=jnp.where(reads, link_s + read_s, behind.storage_s),
        pinned=behind.pinned + jnp.where(here & go & held, units, 0),
        used=behind.used + jnp.where(here & reads & held, units, 0),
    )
    return go, jnp.where(reads, link_s + read_s, link_s), behind
