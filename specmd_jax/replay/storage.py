"""The link between storage and host memory: reads, and the copies behind them (CONTRACT.md section 6)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from specmd_jax.replay.timing import Costs, Timeline, Work, added, running, runs_of
from specmd_jax.specs.hardware import Hardware


class Reads(NamedTuple):
    """What a visit's reads cost, in seconds."""

    stall_s: Float32[Array, ""]  # stall by waiting for them
    storage_s: Float32[Array, ""]  # from the gate until the storage link is free
    busy_s: Float32[Array, ""]  # that it reads


def with_reads(costs: Costs, hardware: Hardware, work: Work) -> Costs:
    """Adds what a read takes: whole experts, at the highest stored precision."""
    read_s = hardware.storage_latency_s + work.expert_bytes[-1] / hardware.storage_bytes_per_s
    return costs._replace(read_s=read_s)


def behind_reads(
    line: Timeline,
    compute_s: Float32[Array, " M"],
    copy_s: Float32[Array, " M"],
    read_s: Float32[Array, " M"],
    copied: Bool[Array, " M"],
    read: Bool[Array, " M"],
    late: Bool[Array, " M"],
    extra_s: Float32[Array, ""],
    link_s: Float32[Array, ""],
    storage_s: Float32[Array, ""],
    adds: Float32[Array, ""],
) -> tuple[Timeline, Reads]:
    """Lets the copies of a visit wait for their reads, expert by expert.

    Reads follow one another from when the storage link is free. A copy starts at the later of its read's end and the
    end of the copy before it, so the i-th ends at the max over the reads j up to i of (the end of j + the copies from j
    to i), or where it would without reads.

    Args:
      line: the visit as it would be with everything in host memory.
      compute_s, copy_s, late, extra_s, adds: as for `timing.timeline`, in copy order.
      read_s: what the read of each takes.
      copied, read: which are copied, and which of them are read first.
      link_s, storage_s: when the links are free.
    """
    ready_s, read_ends_s = running(copy_s), storage_s + running(jnp.where(read, read_s, 0.0))
    place = jnp.arange(copy_s.shape[0])
    before = read[None, :] & (place[None, :] <= place[:, None])
    from_read_s = ready_s[:, None] + (copy_s - ready_s + read_ends_s)[None, :]
    arrival_s = jnp.maximum(link_s + ready_s, jnp.max(jnp.where(before, from_read_s, 0.0), axis=1))

    runs = runs_of(compute_s, copied, late)
    all_s, last_s = jnp.sum(compute_s) + extra_s, jnp.max(jnp.where(copied, arrival_s, 0.0))
    soonest = jnp.maximum(runs.done_s(arrival_s, link_s), all_s)
    there_s = jnp.maximum(last_s, jnp.where(runs.is_late, link_s, 0.0))
    done_s = jnp.maximum(added(soonest, there_s, all_s, adds), line.done_s)

    free_s = jnp.maximum(line.link_s, last_s)
    busy_s = jnp.sum(jnp.where(read, read_s, 0.0))
    return line._replace(done_s=done_s, link_s=free_s), Reads(done_s - line.done_s, storage_s + busy_s, busy_s)
