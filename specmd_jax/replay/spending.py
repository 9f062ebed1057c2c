"""The time that a visit takes up to the next gate (CONTRACT.md section 5)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.replay.demand import Copied
from specmd_jax.replay.make_room import pick
from specmd_jax.replay.state import Cell, Flight, Visit
from specmd_jax.replay.storage import Reads, behind_reads
from specmd_jax.replay.timing import Timeline, dense, roofline, timeline
from specmd_jax.replay.totals import Classified


class Spent(NamedTuple):
    """Seconds from the visit's gate."""

    line: Timeline
    gate_s: Float32[Array, ""]  # the next gate
    reads: Reads | None = None  # with a host tier


def spend(
    cell: Cell,
    flight: Flight,
    visit: Visit,
    experts: Classified,
    copied: Copied,
    runs: Int32[Array, " E"],
    read: Bool[Array, " E"] | None = None,
    storage_s: Float32[Array, ""] | None = None,
) -> Spent:
    """Gives the visit's own time.

    Args:
      runs: tokens that each expert computes on the device.
      read: which copies wait for a read, where there is a host tier.
      storage_s: when the storage link is free, in seconds from the gate.
    """
    setup, costs, layer = cell.setup, cell.numbers.costs, visit.layer
    if not setup.timed:
        zero = jnp.float32(0)
        reads = None if read is None else Reads(zero, zero, zero)
        return Spent(Timeline(zero, zero, zero, zero, zero), zero, reads)
    assert costs is not None
    at = jnp.maximum(copied.level - 1, 0)
    compute_s = roofline(runs, costs.expert_flop_s[layer], pick(costs.expert_read_s[:, layer], at), costs.launch_s)
    copy_s = jnp.where(experts.fetched, pick(costs.copy_s[:, layer], at), 0.0)
    host_s = roofline(
        jnp.where(experts.host, visit.count, 0), costs.host_flop_s[layer], costs.host_read_s[layer], jnp.float32(0)
    )
    # copies go by falling gate mass, or in id order when the demand does not fit; experts that run in another's place
    # come last
    by_mass = jnp.where(visit.by_mass < 0, setup.experts, visit.by_mass)
    by_id = jnp.sort(by_mass)

    def take(row: jax.Array) -> jax.Array:  # in both orders: neither depends on what is swept, unlike the choice
        found = jnp.take(row, jnp.stack([by_id, by_mass]), mode="fill", fill_value=0)
        return jnp.where(copied.stream, found[0], found[1])

    extra_s = jnp.sum(jnp.where(experts.demand, 0.0, compute_s))
    line = timeline(take(compute_s), take(copy_s), take(experts.late), extra_s, jnp.sum(host_s), flight.link_s)
    reads = None
    if read is not None and storage_s is not None:
        assert costs.read_s is not None
        read_s = jnp.where(read, costs.read_s[layer], 0.0)
        line, reads = behind_reads(
            line, take(compute_s), take(copy_s), take(read_s), take(experts.fetched), take(read), take(experts.late),
            flight.link_s, storage_s,
        )  # fmt: skip
    dense_s = roofline(visit.tokens, *dense(costs, layer, visit.tokens, visit.decode), costs.launch_s)
    return Spent(line, line.done_s + jnp.where(visit.ends_layer, dense_s, 0.0), reads)
