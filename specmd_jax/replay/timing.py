"""What a visit costs: copies on one host link, experts as they become ready, the dense part (CONTRACT.md section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.specs.hardware import Hardware

TINY = 1e-30
FEW = 16  # of so many terms sums look at all pairs


class Work(NamedTuple):
    """What a model asks of the hardware, as numbers (float32); bytes and FLOPs of one layer each."""

    expert_bytes: Float32[Array, "Q L"]  # at each stored precision
    expert_flops: Float32[Array, " L"]  # per token
    dense_bytes: Float32[Array, " L"]  # attention, norms, router, shared experts; the last layer adds the head
    dense_flops: Float32[Array, " L"]  # per token
    context_bytes: Float32[Array, " L"] | None = None  # attention over the context, per request; None: no context
    context_flops: Float32[Array, " L"] | None = None  # per request


class Costs(NamedTuple):
    """Seconds, ready for the scan (float32)."""

    copy_s: Float32[Array, "Q L"]  # one expert over the link
    expert_read_s: Float32[Array, "Q L"]  # device memory time of one expert
    expert_flop_s: Float32[Array, " L"]  # per token
    dense_read_s: Float32[Array, " L"]
    dense_flop_s: Float32[Array, " L"]  # per token
    host_read_s: Float32[Array, " L"]  # host memory time of one expert at the highest stored precision
    host_flop_s: Float32[Array, " L"]  # per token
    launch_s: Float32[Array, ""]  # each expert and each dense part
    layer_s: Float32[Array, ""]  # what else a layer takes, whatever it demands
    adds: Float32[Array, ""]  # 0: residents compute while others arrive; 1: when all are there
    handover_s: Float32[Array, ""]  # to the host and back
    host_least_s: Float32[Array, " L"]  # one expert at the rate of the host's memory
    link_load: Float32[Array, " L"]  # what a copy at the highest precision takes of that rate
    context_read_s: Float32[Array, " L"] | None = None  # per request of a decode pass; None: no context
    context_flop_s: Float32[Array, " L"] | None = None
    read_s: Float32[Array, " L"] | None = None  # one expert out of storage; None: nothing is there


def costs(hardware: Hardware, work: Work) -> Costs:
    """Gives roofline times; differentiable and vmappable in every hardware number."""
    copy_s = hardware.link_latency_s + work.expert_bytes / hardware.link_bytes_per_s
    host_least_s = work.expert_bytes[-1] / hardware.host_bytes_per_s
    longest_s = copy_s[-1]
    return Costs(
        copy_s=copy_s,
        expert_read_s=work.expert_bytes / hardware.memory_bytes_per_s,
        expert_flop_s=work.expert_flops / hardware.peak_flops_per_s,
        dense_read_s=work.dense_bytes / hardware.memory_bytes_per_s,
        dense_flop_s=work.dense_flops / hardware.peak_flops_per_s,
        host_read_s=work.expert_bytes[-1] / jnp.minimum(hardware.host_moe_bytes_per_s, hardware.host_bytes_per_s),
        host_flop_s=work.expert_flops / hardware.host_flops_per_s,
        launch_s=jnp.asarray(hardware.launch_s, jnp.float32),
        layer_s=jnp.asarray(hardware.layer_s + hardware.sync_s, jnp.float32),
        adds=jnp.asarray(1 - hardware.overlaps, jnp.float32),
        handover_s=jnp.asarray(hardware.handover_s, jnp.float32),
        host_least_s=host_least_s,
        link_load=jnp.where(longest_s > 0, host_least_s / jnp.where(longest_s > 0, longest_s, 1.0), 0.0),
        context_read_s=None if work.context_bytes is None else work.context_bytes / hardware.memory_bytes_per_s,
        context_flop_s=None if work.context_flops is None else work.context_flops / hardware.peak_flops_per_s,
    )


class Dense(NamedTuple):
    """Seconds of the dense part of a layer, for its roofline."""

    flop_s: Float32[Array, " *layers"]  # per token
    read_s: Float32[Array, " *layers"]


def dense(
    costs: Any, at: Any, tokens: Int32[Array, ""], decode: Bool[Array, ""], turns: Int32[Array, ""] | None = None
) -> Dense:
    """Gives the dense part of a layer, or of several, with attention over the context.

    Args:
      costs: `Costs`, perhaps with axes in front.
      at: where they have the layer.
      tokens, decode: of the pass.
      turns: requests that take part in it; None: a decode pass has one token of each.
    """
    flop_s, read_s = costs.dense_flop_s[at], costs.dense_read_s[at]
    if costs.context_read_s is None or costs.context_flop_s is None:
        return Dense(flop_s, read_s)
    requests = jnp.where(decode, (tokens if turns is None else turns).astype(jnp.float32), 0.0)
    own_flop_s = jnp.where(decode, costs.context_flop_s[at], 0.0)
    return Dense(flop_s + own_flop_s, read_s + requests * costs.context_read_s[at])


class Timeline(NamedTuple):
    """One visit, in seconds from its gate."""

    done_s: Float32[Array, ""]  # all experts have run
    late_s: Float32[Array, ""]  # stall by late hits, ...
    miss_s: Float32[Array, ""]  # ... by the misses' own copies, ...
    busy_s: Float32[Array, ""]  # ... and by finding the link busy
    link_s: Float32[Array, ""]  # the link is free again, if the host does not slow it down


class HostWork(NamedTuple):
    """What a visit computes on the host, which shares its memory with the link."""

    work_s: Float32[Array, ""]  # undisturbed
    after_s: Float32[Array, ""]  # to the host and back
    slow: Float32[Array, ""]  # by how much longer link and host take while both work
    left: Float32[Array, ""]  # the share of the link's rate that prefetch copies have beside the host

    def arrival_s(self, work_s: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """When the link has done so much work of the demand."""
        return work_s + self.slow * jnp.minimum(work_s, self.work_s)

    def end_s(self, link_s: Float32[Array, ""]) -> Float32[Array, ""]:
        """When the host is done, beside so much work of the link."""
        return self.work_s + self.slow * jnp.minimum(self.work_s, link_s)

    def prefetched_s(self, work_s: Float32[Array, ""], demand_s: Float32[Array, ""]) -> Float32[Array, ""]:
        """When the link has done so much work, of which `demand_s` are the demand's and the rest prefetch copies."""
        ahead_s, host_s = jnp.maximum(work_s - demand_s, 0.0), jnp.maximum(self.work_s - demand_s, 0.0)
        most_s = (1.0 - self.left) * host_s
        waits_s = jnp.minimum(ahead_s * ((1.0 - self.left) / jnp.maximum(self.left, TINY)), most_s)
        return self.arrival_s(jnp.minimum(work_s, demand_s)) + ahead_s + waits_s


def host_work(costs: Costs, layer: Int32[Array, ""], work_s: Float32[Array, ""], experts: Int32[Array, ""]) -> HostWork:
    """Gives the host's part of a visit: so much work on so many experts."""
    load = jnp.where(
        work_s > 0, experts.astype(jnp.float32) * costs.host_least_s[layer] / jnp.where(work_s > 0, work_s, 1.0), 0.0
    )
    link_load = costs.link_load[layer]
    spare = jnp.maximum(1.0 - load, 0.0)
    left = jnp.where(spare < link_load, spare / jnp.where(link_load > 0, link_load, 1.0), 1.0)
    after_s = jnp.where(experts > 0, costs.handover_s, 0.0)
    return HostWork(work_s, after_s, jnp.maximum(load + link_load - 1.0, 0.0), left)


def running(terms: Float32[Array, " M"], reverse: bool = False) -> Float32[Array, " M"]:
    """Gives the sums of the terms up to each (or from it on), itself included: M is small and XLA fuses masked sums."""
    place = jnp.arange(terms.shape[0])
    counts = place[None, :] >= place[:, None] if reverse else place[None, :] <= place[:, None]
    return jnp.sum(jnp.where(counts, terms[None, :], 0.0), axis=1)


def scanned(terms: Float32[Array, " M"], reverse: bool = False) -> Float32[Array, " M"]:
    """Does what `running` does, for many terms. A GPU's program sums up in one direction only."""
    sums = jax.lax.cumsum(terms, axis=0)
    return jnp.sum(terms) - sums + terms if reverse else sums


def sums_of(terms: int) -> Callable[..., Float32[Array, " M"]]:
    """Gives the function that sums up so many terms: `running` or `scanned`."""
    return running if terms <= FEW else scanned


class Runs(NamedTuple):
    """What a visit computes on the device, in copy order, of what is not there from the beginning."""

    compute_s: Float32[Array, " M"]
    copied: Bool[Array, " M"]
    behind_s: Float32[Array, " M"]  # of each that is copied, and of those copied after it
    late_s: Float32[Array, ""]  # of the late one
    is_late: Bool[Array, ""]  # there is one

    def done_s(self, arrival_s: Float32[Array, " M"], late_at_s: Float32[Array, ""]) -> Float32[Array, ""]:
        """When they are done, if the device begins each as it arrives; 0 if there are none."""
        copies_s = arrival_s + self.behind_s + jnp.where(arrival_s <= late_at_s, self.late_s, 0.0)
        after_late_s = jnp.sum(jnp.where(self.copied & (arrival_s >= late_at_s), self.compute_s, 0.0))
        late_one_s = jnp.where(self.is_late, late_at_s + self.late_s + after_late_s, 0.0)
        return jnp.maximum(jnp.max(jnp.where(self.copied, copies_s, 0.0)), late_one_s)


def runs_of(
    compute_s: Float32[Array, " M"],
    copied: Bool[Array, " M"],
    late: Bool[Array, " M"],
    running: Callable[..., Float32[Array, " M"]] = running,
) -> Runs:
    """Gives the runs of a visit; arguments as for `timeline`, and which are copied."""
    return Runs(
        compute_s,
        copied,
        running(jnp.where(copied, compute_s, 0.0), reverse=True),
        jnp.sum(jnp.where(late, compute_s, 0.0)),
        jnp.max(late.astype(jnp.int32)) > 0,
    )


def added(
    soonest_s: Float32[Array, ""], last_s: Float32[Array, ""], all_s: Float32[Array, ""], adds: Float32[Array, ""]
) -> Float32[Array, ""]:
    """Gives the end between `soonest_s` and that of a device which computes all when the last has arrived."""
    return soonest_s + adds * (last_s + all_s - soonest_s)


def timeline(
    compute_s: Float32[Array, " M"],
    copy_s: Float32[Array, " M"],
    late: Bool[Array, " M"],
    extra_s: Float32[Array, ""],
    link_s: Float32[Array, ""],
    adds: Float32[Array, ""],
    host: HostWork | None = None,
    running: Callable[..., Float32[Array, " M"]] = running,
) -> Timeline:
    """Runs one visit: experts run one after another as they become ready.

    With arrivals a and computations c, all are done at the max over j of (a_j + the c of all that arrive at a_j or
    later). Residents arrive at 0, the late one when the link is free, copies one behind the other.

    Args:
      compute_s: device seconds of each demanded expert in copy order (0: does not run on the device).
      copy_s: its demand copy (0: none).
      late: its earlier copy ends at `link_s`; at most one.
      extra_s: device seconds of resident experts that run in another's place.
      link_s: at least 0, when the link is free.
      adds: 0: as above; 1: the device begins when everything else is there; or in between.
      host: its work; None: there is none, and the link has the host's memory for itself.
      running: as the function of that name.
    """
    copied = copy_s > 0
    ready_s = running(copy_s)
    runs = runs_of(compute_s, copied, late, running)
    all_s, copies_s, zero = jnp.sum(compute_s) + extra_s, jnp.sum(copy_s), jnp.float32(0)
    any_copied = jnp.max(copied.astype(jnp.int32)) > 0

    def arrival(work_s: Float32[Array, "..."]) -> Float32[Array, "..."]:
        return work_s if host is None else host.arrival_s(work_s)

    late_at = arrival(link_s)
    late_last_s = jnp.where(runs.is_late, late_at, 0.0)

    def done_s(
        device_s: Float32[Array, ""], last_s: Float32[Array, ""], beside_s: Float32[Array, ""]
    ) -> Float32[Array, ""]:
        """When the experts have run: arrivals up to `last_s`, and `beside_s` of the link's work beside the host."""
        host_s = zero if host is None else host.end_s(beside_s) + host.after_s
        soonest = jnp.maximum(jnp.maximum(device_s, all_s), host_s)
        return added(soonest, jnp.maximum(last_s, host_s), all_s, adds)

    at_once = done_s(zero, zero, zero)
    late_link_s = jnp.where(runs.is_late, link_s, 0.0)
    with_late = done_s(jnp.where(runs.is_late, late_at + runs.late_s, 0.0), late_last_s, late_link_s)
    # what arrives no later than the residents need is no stall
    last_s = jnp.maximum(late_last_s, arrival(copies_s))
    link_idle = done_s(runs.done_s(arrival(ready_s), late_at), last_s, jnp.maximum(late_link_s, copies_s))
    link_idle = jnp.maximum(link_idle, with_late)
    last_s = jnp.maximum(late_last_s, jnp.where(any_copied, arrival(link_s + copies_s), 0.0))
    actual = done_s(runs.done_s(arrival(link_s + ready_s), late_at), last_s, link_s + copies_s)
    actual = jnp.maximum(actual, link_idle)
    return Timeline(actual, with_late - at_once, link_idle - with_late, actual - link_idle, link_s + copies_s)


def roofline(
    tokens: Int32[Array, " *E"],
    flop_s: Float32[Array, ""],
    read_s: Float32[Array, " *#E"],
    launch_s: Float32[Array, ""],
) -> Float32[Array, " *E"]:
    """Gives max(arithmetic, memory) + launch for `tokens` > 0, else 0. Of each expert, or of a dense part."""
    return jnp.where(tokens > 0, jnp.maximum(tokens.astype(jnp.float32) * flop_s, read_s) + launch_s, 0.0)
