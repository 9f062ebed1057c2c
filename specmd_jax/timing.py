"""What a visit costs: copies on one host link, experts as they become ready, the dense part (CONTRACT.md section 5)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax.hardware import Hardware


class Work(NamedTuple):
    """What a model asks of the hardware, as numbers (float32); bytes and FLOPs of one layer each."""

    expert_bytes: jax.Array  # [Q, L] at each stored precision
    expert_flops: jax.Array  # [L] per token
    dense_bytes: jax.Array  # [L] attention, norms, router, shared experts; the last layer adds the head
    dense_flops: jax.Array  # [L] per token


class Costs(NamedTuple):
    """Seconds, ready for the scan (float32)."""

    copy_s: jax.Array  # [Q, L] one expert over the link
    expert_read_s: jax.Array  # [Q, L] device memory time of one expert
    expert_flop_s: jax.Array  # [L] per token
    dense_read_s: jax.Array  # [L]
    dense_flop_s: jax.Array  # [L] per token
    host_read_s: jax.Array  # [L] host memory time of one expert at the highest stored precision
    host_flop_s: jax.Array  # [L] per token
    launch_s: jax.Array  # scalar, each expert and each dense part


def costs(hardware: Hardware, work: Work) -> Costs:
    """Roofline times; differentiable and vmappable in every hardware number."""
    return Costs(
        copy_s=hardware.link_latency_s + work.expert_bytes / hardware.link_bytes_per_s,
        expert_read_s=work.expert_bytes / hardware.memory_bytes_per_s,
        expert_flop_s=work.expert_flops / hardware.peak_flops_per_s,
        dense_read_s=work.dense_bytes / hardware.memory_bytes_per_s,
        dense_flop_s=work.dense_flops / hardware.peak_flops_per_s,
        host_read_s=work.expert_bytes[-1] / hardware.host_bytes_per_s,
        host_flop_s=work.expert_flops / hardware.host_flops_per_s,
        launch_s=jnp.asarray(hardware.launch_s),
    )


class Timeline(NamedTuple):
    """One visit, in seconds from its gate."""

    done_s: jax.Array  # all experts have run
    late_s: jax.Array  # stall by late hits, ...
    miss_s: jax.Array  # ... by the misses' own copies, ...
    busy_s: jax.Array  # ... and by finding the link busy
    link_s: jax.Array  # the link is free again


def finish(arrival_s: jax.Array, compute_s: jax.Array) -> jax.Array:
    """When experts that run one after another in order of arrival are done: arrays [M].

    f_i = max(f_{i-1}, a_i) + c_i unrolls to max over j of (a_j + compute of everything that arrives at a_j or later).
    """
    later = arrival_s[None, :] >= arrival_s[:, None]
    return jnp.max(arrival_s + jnp.sum(jnp.where(later, compute_s[None, :], 0.0), axis=1))


def timeline(
    compute_s: jax.Array, copy_s: jax.Array, late: jax.Array, extra_s: jax.Array, host_s: jax.Array, link_s: jax.Array
) -> Timeline:
    """Runs one visit.

    Args:
      compute_s: [M] device seconds of each demanded expert in copy order (0: does not run on the device).
      copy_s: [M] its demand copy (0: none).
      late: [M] its earlier copy ends at `link_s`.
      extra_s: scalar, device seconds of resident experts that run in another's place.
      host_s: scalar, all the host's work.
      link_s: scalar >= 0, when the link is free.
    """
    compute_s, copy_s = jnp.append(compute_s, extra_s), jnp.append(copy_s, 0.0)
    late = jnp.append(late, False)
    copied = copy_s > 0
    # [M, M] rather than a cumulative sum: M is small and XLA fuses it
    upto = jnp.arange(copy_s.shape[0])[:, None] >= jnp.arange(copy_s.shape[0])[None, :]
    ready = jnp.sum(jnp.where(upto, copy_s[None, :], 0.0), axis=1)
    lateness = jnp.where(late, link_s, 0.0)
    at_once = jnp.maximum(jnp.sum(compute_s), host_s)
    with_late = jnp.maximum(finish(lateness, compute_s), host_s)
    link_idle = jnp.maximum(finish(jnp.where(copied, ready, lateness), compute_s), host_s)
    actual = jnp.maximum(finish(jnp.where(copied, link_s + ready, lateness), compute_s), host_s)
    link_s = link_s + jnp.sum(copy_s)
    return Timeline(actual, with_late - at_once, link_idle - with_late, actual - link_idle, link_s)


def roofline(tokens: jax.Array, flop_s: jax.Array, read_s: jax.Array, launch_s: jax.Array) -> jax.Array:
    """max(arithmetic, memory) + launch, for `tokens` > 0; 0 otherwise."""
    return jnp.where(tokens > 0, jnp.maximum(tokens * flop_s, read_s) + launch_s, 0.0)
