"""What a visit costs: copies on one host link, experts as they become ready, the dense part (CONTRACT.md section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.specs.hardware import Hardware


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
    context_read_s: Float32[Array, " L"] | None = None  # per request of a decode pass; None: no context
    context_flop_s: Float32[Array, " L"] | None = None
    read_s: Float32[Array, " L"] | None = None  # one expert out of storage; None: nothing is there


def costs(hardware: Hardware, work: Work) -> Costs:
    """Gives roofline times; differentiable and vmappable in every hardware number."""
    return Costs(
        copy_s=hardware.link_latency_s + work.expert_bytes / hardware.link_bytes_per_s,
        expert_read_s=work.expert_bytes / hardware.memory_bytes_per_s,
        expert_flop_s=work.expert_flops / hardware.peak_flops_per_s,
        dense_read_s=work.dense_bytes / hardware.memory_bytes_per_s,
        dense_flop_s=work.dense_flops / hardware.peak_flops_per_s,
        host_read_s=work.expert_bytes[-1] / hardware.host_bytes_per_s,
        host_flop_s=work.expert_flops / hardware.host_flops_per_s,
        launch_s=jnp.asarray(hardware.launch_s, jnp.float32),
        context_read_s=None if work.context_bytes is None else work.context_bytes / hardware.memory_bytes_per_s,
        context_flop_s=None if work.context_flops is None else work.context_flops / hardware.peak_flops_per_s,
    )


class Dense(NamedTuple):
    """Seconds of the dense part of a layer, for its roofline."""

    flop_s: Float32[Array, " *layers"]  # per token
    read_s: Float32[Array, " *layers"]


def dense(costs: Any, at: Any, tokens: Int32[Array, ""], decode: Bool[Array, ""]) -> Dense:
    """Gives the dense part of a layer, or of several, with attention over the context.

    Args:
      costs: `Costs`, perhaps with axes in front.
      at: where they have the layer.
      tokens, decode: of the pass.
    """
    flop_s, read_s = costs.dense_flop_s[at], costs.dense_read_s[at]
    if costs.context_read_s is None or costs.context_flop_s is None:
        return Dense(flop_s, read_s)
    requests = jnp.where(decode, tokens.astype(jnp.float32), 0.0)  # a decode pass has one token of each
    own_flop_s = jnp.where(decode, costs.context_flop_s[at], 0.0)
    return Dense(flop_s + own_flop_s, read_s + requests * costs.context_read_s[at])


class Timeline(NamedTuple):
    """One visit, in seconds from its gate."""

    done_s: Float32[Array, ""]  # all experts have run
    late_s: Float32[Array, ""]  # stall by late hits, ...
    miss_s: Float32[Array, ""]  # ... by the misses' own copies, ...
    busy_s: Float32[Array, ""]  # ... and by finding the link busy
    link_s: Float32[Array, ""]  # the link is free again


def running(terms: Float32[Array, " M"], reverse: bool = False) -> Float32[Array, " M"]:
    """Gives the sums of the terms up to each (or from it on), itself included: M is small and XLA fuses masked sums."""
    place = jnp.arange(terms.shape[0])
    counts = place[None, :] >= place[:, None] if reverse else place[None, :] <= place[:, None]
    return jnp.sum(jnp.where(counts, terms[None, :], 0.0), axis=1)


def timeline(
    compute_s: Float32[Array, " M"],
    copy_s: Float32[Array, " M"],
    late: Bool[Array, " M"],
    extra_s: Float32[Array, ""],
    host_s: Float32[Array, ""],
    link_s: Float32[Array, ""],
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
      host_s: all the host's work.
      link_s: at least 0, when the link is free.
      running: as the function of that name.
    """
    copied = copy_s > 0
    ready_s = running(copy_s)
    behind_s = running(jnp.where(copied, compute_s, 0.0), reverse=True)
    late_s, is_late = jnp.sum(jnp.where(late, compute_s, 0.0)), jnp.max(late.astype(jnp.int32)) > 0

    def done_s(arrival_s: Float32[Array, " M"]) -> Float32[Array, ""]:
        copies = arrival_s + behind_s + jnp.where(arrival_s <= link_s, late_s, 0.0)
        late_one = link_s + late_s + jnp.sum(jnp.where(copied & (arrival_s >= link_s), compute_s, 0.0))
        copies_s = jnp.max(jnp.where(copied, copies, 0.0))
        return jnp.maximum(jnp.maximum(copies_s, jnp.where(is_late, late_one, 0.0)), at_once)

    at_once = jnp.maximum(jnp.sum(compute_s) + extra_s, host_s)
    with_late = jnp.maximum(at_once, jnp.where(is_late, link_s + late_s, 0.0))
    # what arrives no later than the residents need is no stall
    link_idle = jnp.maximum(done_s(ready_s), with_late)
    actual = jnp.maximum(done_s(link_s + ready_s), link_idle)
    return Timeline(actual, with_late - at_once, link_idle - with_late, actual - link_idle, link_s + jnp.sum(copy_s))


def roofline(
    tokens: Int32[Array, " *E"],
    flop_s: Float32[Array, ""],
    read_s: Float32[Array, " *#E"],
    launch_s: Float32[Array, ""],
) -> Float32[Array, " *E"]:
    """Gives max(arithmetic, memory) + launch for `tokens` > 0, else 0. Of each expert, or of a dense part."""
    return jnp.where(tokens > 0, jnp.maximum(tokens.astype(jnp.float32) * flop_s, read_s) + launch_s, 0.0)
