"""The link between storage and host memory: reads, and the copies behind them (CONTRACT.md section 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from specmd_jax.replay.sharing import HostTimes, Line, side_by_side
from specmd_jax.replay.timing import Costs, HostWork, Timeline, Work, added, running, runs_of
from specmd_jax.specs.hardware import Hardware


class Reads(NamedTuple):
    """What a visit's reads cost, in seconds."""

    stall_s: Float32[Array, ""]  # stall by waiting for them
    storage_s: Float32[Array, ""]  # from the gate until the storage link is free
    busy_s: Float32[Array, ""]  # that it reads
    # where the host computes:
    copying_s: Float32[Array, ""] | None = None  # by which demand copies, and being slowed down, keep the link busy
    host_s: Float32[Array, ""] | None = None  # that the host computes
    host: HostTimes | None = None  # and when


def with_reads(costs: Costs, hardware: Hardware, work: Work) -> Costs:
    """Adds what a read takes: whole experts, at the highest stored precision."""
    read_s = hardware.storage_latency_s + work.expert_bytes[-1] / hardware.storage_bytes_per_s
    return costs._replace(read_s=read_s)


def behind_reads(
    line: Timeline,
    compute_s: Float32[Array, " M"],
    copy_s: Float32[Array, " M"],
    ready_s: Float32[Array, " M"],
    copied: Bool[Array, " M"],
    late: Bool[Array, " M"],
    extra_s: Float32[Array, ""],
    link_s: Float32[Array, ""],
    adds: Float32[Array, ""],
) -> tuple[Timeline, Reads]:
    """Lets the copies of a visit wait for their reads, expert by expert.

    A copy starts at the later of its read's end and the end of the copy before it, so the i-th ends at the max over the
    reads j up to i of (the end of j + the copies from j to i), or where it would without reads.

    Args:
      line: the visit as it would be with everything in host memory.
      compute_s, copy_s, late, extra_s, adds: as for `timing.timeline`, in copy order.
      ready_s: when each is in host memory, in seconds from the gate.
      copied: which are copied.
      link_s: when the link is free.

    Returns:
      The visit; and its reads, but for what storage does.
    """
    upto_s, place = running(copy_s), jnp.arange(copy_s.shape[0])
    before = (copied & (ready_s > 0))[None, :] & (place[None, :] <= place[:, None])
    from_read_s = upto_s[:, None] + (copy_s - upto_s + ready_s)[None, :]
    arrival_s = jnp.maximum(link_s + upto_s, jnp.max(jnp.where(before, from_read_s, 0.0), axis=1))

    runs = runs_of(compute_s, copied, late)
    all_s, last_s = jnp.sum(compute_s) + extra_s, jnp.max(jnp.where(copied, arrival_s, 0.0))
    soonest = jnp.maximum(runs.done_s(arrival_s, link_s), all_s)
    there_s = jnp.maximum(last_s, jnp.where(runs.is_late, link_s, 0.0))
    done_s = jnp.maximum(added(soonest, there_s, all_s, adds), line.done_s)

    free_s, zero = jnp.maximum(line.link_s, last_s), jnp.float32(0)
    return line._replace(done_s=done_s, link_s=free_s), Reads(done_s - line.done_s, zero, zero)


def beside_host(
    line: Timeline,
    compute_s: Float32[Array, " M"],
    copy_s: Float32[Array, " M"],
    host_s: Float32[Array, " M"],
    ready_s: Float32[Array, " M"],
    copied: Bool[Array, " M"],
    hosted: Bool[Array, " M"],
    late: Bool[Array, " M"],
    extra_s: Float32[Array, ""],
    link_s: Float32[Array, ""],
    storage_s: Float32[Array, ""],
    adds: Float32[Array, ""],
    host: HostWork,
    running: Callable[..., Float32[Array, " M"]] = running,
) -> tuple[Timeline, Reads]:
    """Lets copies and experts on the host wait for their reads, while link and host share the host's memory.

    Args:
      line: the visit as it would be with everything in host memory.
      compute_s, copy_s, late, extra_s, adds, host, running: as for `timing.timeline`, in copy order.
      host_s: what each takes on the host, undisturbed.
      ready_s: when each is in host memory, in seconds from the gate.
      copied, hosted: which are copied, and which run on the host.
      link_s, storage_s: when the links are free. If both are busy, storage reads what is then copied.

    Returns:
      The visit, whose `link_s` is a moment here, and no work; and its reads, but for what storage does.
    """
    begins_s = jnp.minimum(storage_s, link_s)  # what is left of the copy in flight
    needed = (begins_s > 0) | jnp.any((copied | hosted) & (ready_s > 0))

    def with_flight(first: Float32[Array, ""] | Bool[Array, ""], rows: Array) -> Array:
        return jnp.concatenate([first[None], rows])

    none_s, none = jnp.float32(0), jnp.asarray(False)
    links = Line(
        with_flight(link_s > 0, copied), with_flight(begins_s, ready_s), with_flight(link_s - begins_s, copy_s)
    )
    hosts = Line(with_flight(none, hosted), with_flight(none_s, ready_s), with_flight(none_s, host_s))
    ends = side_by_side(links, hosts, host.slow, needed)
    late_at_s, arrival_s = ends.link_s[0], ends.link_s[1:]
    runs = runs_of(compute_s, copied, late, running)
    all_s = jnp.sum(compute_s) + extra_s
    ended_s = jnp.max(ends.host_s) + host.after_s
    soonest = jnp.maximum(jnp.maximum(runs.done_s(arrival_s, late_at_s), all_s), ended_s)
    last_s = jnp.maximum(jnp.max(arrival_s), jnp.where(runs.is_late, late_at_s, 0.0))
    done_s = jnp.where(needed, added(soonest, jnp.maximum(last_s, ended_s), all_s, adds), line.done_s)

    free_s = jnp.where(needed, jnp.max(ends.link_s), host.arrival_s(line.link_s))
    order = jnp.argsort(jnp.where(hosts.there, hosts.ready_s, -1.0), stable=True)  # who is no piece takes no time
    end_s = ends.host_s[order]
    before_s = jnp.concatenate([jnp.zeros(1), end_s[:-1]])
    begin_s = jnp.where(hosts.there[order], jnp.maximum(before_s, hosts.ready_s[order]), 0.0)
    at_once_s = jnp.zeros(end_s.shape).at[0].set(host.end_s(line.link_s))
    times = HostTimes(jnp.where(needed, begin_s, 0.0), jnp.where(needed, end_s, at_once_s), host.left)
    reads = Reads(
        stall_s=done_s - line.done_s,
        storage_s=storage_s,
        busy_s=none_s,
        copying_s=jnp.where(needed, ends.busy_s[0] + begins_s, host.arrival_s(line.link_s)) - link_s,
        host_s=jnp.where(needed, ends.busy_s[1], host.end_s(line.link_s)),
        host=times,
    )
    return line._replace(done_s=done_s, link_s=free_s), reads
