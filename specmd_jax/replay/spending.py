"""The time that a visit takes up to the next gate, and who computes what where time decides (CONTRACT.md section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.policies.base import Plan
from specmd_jax.replay.demand import Copied, Found
from specmd_jax.replay.make_room import pick
from specmd_jax.replay.state import Cell, Flight, Visit
from specmd_jax.replay.storage import Reads, behind_reads, beside_host
from specmd_jax.replay.timing import Costs, Timeline, dense, host_work, roofline, sums_of, timeline
from specmd_jax.replay.totals import Classified

NEAR = 1e-6
"""Of the earliest end of a visit: how much later another still counts as equally early."""


class InHost(NamedTuple):
    """How a visit finds the host tier, where there is one."""

    there: Bool[Array, " E"]  # in host memory, of the visited layer
    storage_s: Float32[Array, ""]  # seconds from the gate until the storage link is free
    arriving: Bool[Array, " E"] | None = None  # who is there, but is being read until then; None: nobody ever is


class Spent(NamedTuple):
    """Seconds from the visit's gate."""

    line: Timeline
    gate_s: Float32[Array, ""]  # the next gate
    visit_s: Float32[Array, ""]  # what the visit takes: drafting before its gate is its own, behind it the next one's
    host_s: Float32[Array, ""]  # until the host has computed
    clock: Callable[[Float32[Array, ""]], Float32[Array, ""]]
    """when the link has done so many seconds of undisturbed work, prefetch copies behind the demand's"""
    reads: Reads | None = None  # with a host tier
    copied_s: Callable[[Float32[Array, ""], Float32[Array, ""]], Float32[Array, ""]] | None = None
    """when a prefetch copy that begins then and takes so long is there, where the host has to wait, too; the seconds of
    the link are then moments, and no work; None: the copy begins when so much work is done, and adds to it"""


def spend(
    cell: Cell,
    flight: Flight,
    visit: Visit,
    experts: Classified,
    copied: Copied,
    runs: Int32[Array, " E"],
    behind: InHost | None = None,
) -> Spent:
    """Gives the visit's own time.

    Args:
      runs: tokens that each expert computes on the device.
      behind: the host tier, where there is one.
    """
    setup, costs, layer, zero = cell.setup, cell.numbers.costs, visit.layer, jnp.float32(0)
    if not setup.timed:
        reads = None if behind is None else Reads(zero, zero, zero)
        return Spent(Timeline(zero, zero, zero, zero, zero), zero, zero, zero, _undisturbed, reads)
    assert costs is not None
    at = jnp.maximum(copied.level - 1, 0)
    compute_s = roofline(runs, costs.expert_flop_s[layer], pick(costs.expert_read_s[:, layer], at), costs.launch_s)
    copy_s = jnp.where(experts.fetched, pick(costs.copy_s[:, layer], at), 0.0)
    host, host_s = None, jnp.zeros(setup.experts)
    if not cell.policies.miss.fetches_all:
        host_s = _host_s(costs, layer, jnp.where(experts.host, visit.count, 0))
        host = host_work(costs, layer, jnp.sum(host_s), jnp.sum(experts.host))
    # copies go by falling gate mass, or in id order when the demand does not fit; experts that run in another's place
    # come last
    by_mass = jnp.where(visit.by_mass < 0, setup.experts, visit.by_mass)
    by_id = jnp.sort(by_mass)

    def take(row: jax.Array) -> jax.Array:  # in both orders: neither depends on what is swept, unlike the choice
        found = jnp.take(row, jnp.stack([by_id, by_mass]), mode="fill", fill_value=0)
        return jnp.where(copied.stream, found[0], found[1])

    extra_s = jnp.sum(jnp.where(experts.demand, 0.0, compute_s))
    line = timeline(take(compute_s), take(copy_s), take(experts.late), extra_s, flight.link_s, costs.adds, host)
    reads = None
    if behind is not None:
        assert costs.read_s is not None
        read = (experts.fetched | experts.host) & ~behind.there
        read_s = jnp.where(read, costs.read_s[layer], 0.0)
        both = take(compute_s), take(copy_s)
        sums, arriving = sums_of(by_mass.shape[0]), None if behind.arriving is None else take(behind.arriving)
        ready_s, busy_s = _ready_s(take(read), take(read_s), arriving, behind, sums), jnp.sum(read_s)
        if host is None or not cell.policies.miss.hosts:
            line, reads = behind_reads(
                line, *both, ready_s, take(experts.fetched), take(experts.late),
                extra_s, flight.link_s, costs.adds,
            )  # fmt: skip
        else:
            line, reads = beside_host(
                line, *both, take(host_s), ready_s, take(experts.fetched), take(experts.host), take(experts.late),
                extra_s, flight.link_s, behind.storage_s, costs.adds, host, sums,
            )  # fmt: skip
        reads = reads._replace(storage_s=behind.storage_s + busy_s, busy_s=busy_s)
    spent = dense(costs, layer, visit.tokens, visit.decode, visit.turns)
    dense_s = roofline(visit.tokens, *spent, costs.launch_s + costs.layer_s)
    gate_s = visit_s = line.done_s + jnp.where(visit.ends_layer, dense_s, 0.0)
    if visit.drafting_s is not None:
        visit_s, gate_s = gate_s + visit.drafting_s[0], gate_s + visit.drafting_s[1]
    if host is None:
        return Spent(line, gate_s, visit_s, zero, _undisturbed, reads)
    if reads is not None and reads.host is not None and reads.host_s is not None:
        return Spent(line, gate_s, visit_s, reads.host_s, _undisturbed, reads, reads.host.copied_s)
    clock = lambda work_s: host.prefetched_s(work_s, line.link_s)  # noqa: E731
    return Spent(line, gate_s, visit_s, host.end_s(line.link_s), clock, reads)


def _ready_s(
    read: Bool[Array, " M"],
    read_s: Float32[Array, " M"],
    arriving: Bool[Array, " M"] | None,
    behind: InHost,
    sums: Callable[..., Float32[Array, " M"]],
) -> Float32[Array, " M"]:
    """Gives when experts are in host memory, in the order of their reads: seconds from the gate."""
    there_s = jnp.float32(0) if arriving is None else jnp.where(arriving, behind.storage_s, 0.0)
    return jnp.where(read, behind.storage_s + sums(read_s), there_s)


def divide(cell: Cell, flight: Flight, visit: Visit, found: Found, plan: Plan, behind: InHost | None = None) -> Plan:
    """Gives the plan with a side for each miss that may be copied or run on the host: as many as end the visit first
    are copied, by falling gate mass.
    """
    costs, layer = cell.numbers.costs, visit.layer
    assert costs is not None
    ids = jnp.arange(cell.setup.experts, dtype=jnp.int32)
    by_mass = jnp.where(visit.by_mass < 0, cell.setup.experts, visit.by_mass)

    def take(row: jax.Array) -> jax.Array:
        return jnp.take(row, by_mass, mode="fill", fill_value=0)

    hit = visit.demand & (found.level > 0) & (found.level >= plan.need)
    miss, at = visit.demand & ~hit, jnp.maximum(jnp.where(hit, found.level, plan.fetch) - 1, 0)
    either, fetched = take(miss & (plan.fetch > 0) & plan.host), take(miss & (plan.fetch > 0) & ~plan.host)
    hosted = take(miss & (plan.fetch == 0) & plan.host)
    present = take(hit) | fetched
    compute_s = take(
        roofline(visit.count, costs.expert_flop_s[layer], pick(costs.expert_read_s[:, layer], at), costs.launch_s)
    )
    copy_s, late = take(pick(costs.copy_s[:, layer], at)), take(hit & found.flying)
    host_s = take(_host_s(costs, layer, visit.count))
    order, sums = jnp.cumsum(either) - 1, sums_of(by_mass.shape[0])
    ready_s = None
    if behind is not None:
        assert costs.read_s is not None
        read = (either | fetched | hosted) & ~take(behind.there)
        arriving = None if behind.arriving is None else take(behind.arriving)
        ready_s = _ready_s(read, jnp.where(read, costs.read_s[layer], 0.0), arriving, behind, sums)

    def done_s(copies: Int32[Array, ""]) -> Float32[Array, ""]:
        copied, computed = _sides(either, order, copies, fetched, hosted)
        host = host_work(costs, layer, jnp.sum(jnp.where(computed, host_s, 0.0)), jnp.sum(computed))
        runs_s, copies_s = jnp.where(present | copied, compute_s, 0.0), jnp.where(copied, copy_s, 0.0)
        line = timeline(runs_s, copies_s, late, jnp.float32(0), flight.link_s, costs.adds, host, sums)
        if behind is not None and ready_s is not None:
            line, _ = beside_host(
                line, runs_s, copies_s, host_s, ready_s, copied, computed, late,
                jnp.float32(0), flight.link_s, behind.storage_s, costs.adds, host, sums,
            )  # fmt: skip
        return line.done_s

    counts = jnp.arange(by_mass.shape[0] + 1, dtype=jnp.int32)
    ends_s = jax.vmap(done_s)(counts)
    copies = jnp.max(jnp.where(ends_s <= jnp.min(ends_s) * (1.0 + NEAR), counts, 0))
    _, computed = _sides(either, order, copies, fetched, hosted)
    on_host = jnp.any(computed[:, None] & (by_mass[:, None] == ids[None]), axis=0)
    return plan._replace(fetch=jnp.where(on_host, 0, plan.fetch), host=on_host)


def _sides(
    either: Bool[Array, " M"],
    order: Int32[Array, " M"],
    copies: Int32[Array, ""],
    fetched: Bool[Array, " M"],
    hosted: Bool[Array, " M"],
) -> tuple[Bool[Array, " M"], Bool[Array, " M"]]:
    """Gives what is copied and what runs on the host, with `copies` of those that may go either way copied."""
    return fetched | (either & (order < copies)), hosted | (either & (order >= copies))


def _host_s(costs: Costs, layer: Int32[Array, ""], tokens: Int32[Array, " E"]) -> Float32[Array, " E"]:
    return roofline(tokens, costs.host_flop_s[layer], costs.host_read_s[layer], jnp.float32(0))


def _undisturbed(work_s: Float32[Array, ""]) -> Float32[Array, ""]:
    return work_s
