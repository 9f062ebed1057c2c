"""What the machine gives: rates of copies and memory, and everything resident in one program."""

from __future__ import annotations

import functools
import importlib.util
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.offloading.bench import Bench, Result
from experiments.common.timing import issue_s, median_s
from specmd_jax import moe
from specmd_jax.moe.fused.streaming import Copies, copy_all, slot_shelf
from specmd_jax.moe.model.forward import greedy_step
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime import slots, store

settled_s = functools.partial(median_s, repeats=10, unmeasured=2)


def copies(bench: Bench) -> Result:
    """Times copies from pinned host memory, by how many experts are in flight, beside compute, and by torch."""
    device, size = store.sharding(store.DEVICE), bench.expert_bytes
    flat = [expert for row in bench.store.experts for expert in row]
    fetch = slots.fetch(device)
    found: Result = {"expert_bytes": size}
    for count in (1, 2, 8, 32):
        took = settled_s(lambda n=count: jax.device_put(flat[:n], device))
        found[f"put_{count}_GB_per_s"] = count * size / took / 1e9
        found[f"put_{count}_s"] = took
    found["put_issue_8_s"] = issue_s(lambda: jax.device_put(flat[:8], device))
    for count in (1, 2, 8):
        found[f"program_{count}_GB_per_s"] = count * size / settled_s(lambda n=count: fetch(flat[:n])) / 1e9
    found["program_issue_8_s"] = issue_s(lambda: fetch(flat[:8]))
    n = 256 if bench.toy else 8192
    a = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
    busy = jax.jit(lambda a: jax.lax.fori_loop(0, 8, lambda _, x: (x @ a) / n**0.5, a))
    alone_s, copy_s = settled_s(lambda: busy(a)), found["put_32_s"]

    def both() -> Any:
        moved = jax.device_put(flat[:32], device)  # asked for first: a copy waits for programs started before it
        return busy(a), moved

    def reverse() -> Any:
        out = busy(a)
        return out, jax.device_put(flat[:32], device)

    for name, call in (("copy_first", both), ("compute_first", reverse)):
        took = settled_s(call)
        found[f"overlap_{name}"] = (alone_s + copy_s - took) / min(alone_s, copy_s)
    found |= {"compute_alone_s": alone_s}
    found |= device_rates(bench)
    if importlib.util.find_spec("torch") and jax.default_backend() == "gpu":
        import torch  # pyright: ignore[reportMissingImports]

        sources = [torch.empty(size // 2, dtype=torch.bfloat16).pin_memory() for _ in range(32)]
        targets = [torch.empty_like(source, device="cuda") for source in sources]
        for count in (1, 8, 32):
            rounds = []
            for _ in range(8):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for source, target in zip(sources[:count], targets[:count], strict=True):
                    target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()
                rounds.append(time.perf_counter() - begin)
            found[f"torch_{count}_GB_per_s"] = count * size / float(np.median(rounds)) / 1e9
        del sources, targets
    return found


def link_rate(bench: Bench) -> float:
    """GB/s of the link by itself: one array of pinned memory to the device."""
    size = (1 << 20) if bench.toy else (1 << 29)
    pinned = jax.device_put(np.ones(size, np.uint8), store.sharding(store.PINNED))
    return size / settled_s(lambda: jax.device_put(pinned, store.sharding(store.DEVICE))) / 1e9


def device_rates(bench: Bench) -> Result:
    """GB/s of the device's own memory, by copying and by summing."""
    big = jnp.zeros((1 << 20) if bench.toy else (4 << 30), jnp.bfloat16) + 1
    twice = jax.jit(lambda x: x * 2)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    written, read = 2 * big.nbytes / settled_s(lambda: twice(big)), big.nbytes / settled_s(lambda: total(big))
    return {
        "device_copy_GB_per_s": written / 1e9,
        "device_read_GB_per_s": read / 1e9,
        "device_GB_per_s": max(written, read) / 1e9,
    }


def resident(bench: Bench) -> Result:
    """Times one decode step with every expert on the device as one program, against reading the active weights once."""
    cfg, params, stacks = bench.cfg, bench.params, tuple(bench.stacks)
    net = moe.build(cfg)
    cache = moe.init_cache(cfg, 1, bench.prompt + bench.steps)
    token, at = jnp.ones(1, jnp.int32), jnp.full(1, bench.prompt, jnp.int32)
    dense = tree_bytes(params) - tree_bytes(params["embed"])
    active = dense + bench.expert_bytes * cfg.top_k * len(cfg.moe_layers) + 2 * tree_bytes(cache)
    rate = (bench.result.get("copies") or device_rates(bench))["device_GB_per_s"] * 1e9
    many = 16 if bench.toy else 64

    @jax.jit
    def loop(p: Any, s: Any, token: Any, cache: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            token, cache = carry
            token, _, cache, _ = greedy_step(net, p, s, token, cache, at)
            return (token, cache), token

        return jax.lax.scan(body, (token, cache), None, length=many)[1]

    loop_s = median_s(lambda: loop(params, stacks, token, cache), 5) / many
    found: Result = {"step_in_loop_s": loop_s, "active_bytes": active}
    found |= {
        "device_GB_per_s": rate / 1e9,
        "bandwidth_bound_s": active / rate,
        "ratio_to_bound": loop_s * rate / active,
    }
    if bench.left_s < (5 if bench.toy else 90):
        return found | {"stopped": "out of time"}
    bench.result["resident"] = found
    bench.save()
    step = jax.jit(lambda p, s, t, c, at: greedy_step(net, p, s, t, c, at)[:3], donate_argnums=3)
    took = []
    for _ in range(30):
        begin = time.perf_counter()
        token, _, cache = jax.block_until_ready(step(params, stacks, token, cache, at))
        took.append(time.perf_counter() - begin)
    return found | {"step_s": float(np.median(took[5:]))}


def loop_rate(bench: Bench) -> float:
    """GB/s of experts copied one after the other by a loop in a program, as the fused engine does."""
    held, count = bench.stacked, 8 if bench.toy else 64
    places = jax.tree.map(lambda leaf: jnp.zeros((4, *leaf.shape[1:]), leaf.dtype), held.stack)

    @functools.partial(jax.jit, donate_argnums=1)
    def copy(host: Any, places: Any, flat: Any) -> Any:
        return copy_all(slot_shelf(host), places, Copies(flat, flat % 4, jnp.int32(count)))

    flat, took = jnp.arange(count, dtype=jnp.int32), []
    for _ in range(6):
        jax.block_until_ready(places)
        begin = time.perf_counter()
        places = jax.block_until_ready(copy(held.stack, places, flat))
        took.append(time.perf_counter() - begin)
    return count * bench.expert_bytes / float(np.median(took[1:])) / 1e9
