"""Missing experts by the host's processor, beside those that the device copies: what would it give?

Rows say what was measured. Rows "split" are estimated from these: so many of a visit's missing experts on the host, the
others copied meanwhile, each at the rate that it has beside the other.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.offloading.bench import Bench, Result
from experiments.benchmarks.offloading.processor import Compute, computes, token
from experiments.calibration.loops import Loop
from experiments.calibration.subject import Subject, few_layers, make_subject
from experiments.calibration.visits import mask, path, reads, visit_loop
from experiments.common.timing import median_s
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.runtime.store import DEVICE, sharding

LAYERS = 2
MOST_EXPERTS = 32
"""Experts that the processor goes through in turn: more than its caches hold, at a real size."""
MISSING = 8
"""The most missing experts of a visit that a split is worked out for."""


class Sides(NamedTuple):
    """Seconds of one expert on each side, by itself and beside the other."""

    copy_s: float
    copy_beside_s: float
    host_s: float
    host_beside_s: float


def host(bench: Bench) -> Result:
    """Measures both sides, alone and together, and the way between them; then the best splits."""
    own = make_subject(bench.name, bench.cfg, few_layers(bench.cfg, LAYERS), "25%")
    found: Result = {"expert_bytes": own.store.expert_bytes, "cores": len(_cores()), "layers": LAYERS, "rows": []}
    bench.result["host"] = found

    def add(what: str, by: str, seconds: float, size: int | None = None, **more: Any) -> None:
        rate = {} if size is None else {"GB_per_s": size / seconds / 1e9}
        found["rows"].append({"what": what, "by": by, "us": 1e6 * seconds, **rate, **more, "evidence": "measured"})
        bench.save()

    link = _Link(own, 4 if bench.toy else 32)
    size = own.store.expert_bytes
    copy_s = link.alone_s(3 if bench.toy else 8)
    add("copy and compute a missing expert", link.by, copy_s, size)
    sides, repeats = {}, 3 if bench.toy else 8
    for by, bytes_, compute in computes(own.cfg, _experts(own)):
        for many in (1, own.cfg.top_k):
            how = by if many == 1 else f"{by}, {many} at once"
            with ThreadPoolExecutor(many) as pool:
                batch = _batches(compute, min(MOST_EXPERTS, own.cfg.experts), many, pool)
                host_s = median_s(batch, repeats, unmeasured=2) / many
                add("an expert on the host", how, host_s, bytes_)
                copy_beside_s, host_beside_s = link.beside(batch, many)
            add("an expert on the host, beside copies", how, host_beside_s, bytes_, over_alone=host_beside_s / host_s)
            over = copy_beside_s / copy_s
            add("a missing expert, beside the host's work", how, copy_beside_s, size, over_alone=over)
            sides[how] = Sides(copy_s, copy_beside_s, host_s, host_beside_s)
        del compute, batch
    ways = dict(_round_trips(own, 20 if bench.toy else 50))
    for by, seconds in ways.items():
        add("round trip of a gate", by, seconds)
    round_s = min(ways["host between two programs"], ways["callback inside a program"])
    found["split_round_us"] = 1e6 * round_s
    found["rows"] += [_estimated(missing, sides, round_s) for missing in range(1, MISSING + 1)]
    bench.save()
    return found


def best_split(missing: int, sides: Sides, round_s: float) -> tuple[int, float]:
    """Gives how many of a visit's missing experts to compute on the host so that it ends soonest, and its seconds; of
    equal ones the fewest. ``round_s``: from the gate to the host and back, once for a visit."""

    def seconds(on_host: int) -> float:
        copied = missing - on_host
        if not on_host:
            return missing * sides.copy_s
        host_s = sides.host_beside_s if copied else sides.host_s
        return max(copied * sides.copy_beside_s, round_s + on_host * host_s)

    on_host = min(range(missing + 1), key=seconds)
    return on_host, seconds(on_host)


def _estimated(missing: int, ways: dict[str, Sides], round_s: float) -> Result:
    """Gives the best split by the way to compute on the host that makes it the shortest."""
    splits = {how: best_split(missing, sides, round_s) for how, sides in ways.items()}
    how = min(splits, key=lambda how: splits[how][1])
    (on_host, seconds), copying_s = splits[how], missing * ways[how].copy_s
    return {
        "what": "split",
        "by": how if on_host else "copying all",
        "missing": missing,
        "on_host": on_host,
        "us": 1e6 * seconds,
        "us_a_missing_expert": 1e6 * seconds / missing,
        "us_copying_all": 1e6 * copying_s,
        "over_copying_all": seconds / copying_s,
        "evidence": "estimated",
    }


class _Link:
    """Visits whose experts are all missing, one after the other on the device."""

    def __init__(self, own: Subject, visits: int):
        self._missing, self.by = own.cfg.top_k, path(own.kernels.experts)
        self._loop: Loop = visit_loop(own, own.slots(), 1, visits)
        given = reads(own, own.host, np.arange(own.cfg.top_k)[None])
        self._given = given._replace(missing=mask(own, range(own.cfg.top_k)))

    def alone_s(self, repeats: int) -> float:
        """Gives the seconds of one missing expert."""
        return self._loop.seconds(self._given, repeats) / self._missing

    def beside(self, batch: Callable[[], Any], many: int) -> tuple[float, float]:
        """Gives the seconds of a missing expert while the host computes batches of ``many``, and those of an expert on
        the host meanwhile."""

        def visits() -> float:
            began = time.perf_counter()
            jax.block_until_ready(self._loop.run(self._given))
            return time.perf_counter() - began

        with ThreadPoolExecutor(1) as other:
            running, began, count = other.submit(visits), time.perf_counter(), 0
            while not running.done() or not count:
                batch()
                count += 1
            host_s = (time.perf_counter() - began) / (count * many)
            return running.result() / (self._loop.steps * self._missing), host_s


def _experts(own: Subject) -> list[Expert]:
    """Gives some experts as numpy arrays."""
    stack = jax.tree.map(lambda leaf: np.asarray(leaf[: min(MOST_EXPERTS, own.cfg.experts)]), own.store.stack)
    return [jax.tree.map(lambda leaf, n=n: leaf[n], stack) for n in range(stack.gate_up.shape[0])]


def _batches(compute: Compute, experts: int, many: int, pool: ThreadPoolExecutor) -> Callable[[], Any]:
    """Gives a function that computes the next ``many`` experts at once."""
    turn = itertools.cycle(range(experts))

    def batch() -> Any:
        numbers = [next(turn) for _ in range(many)]
        return compute(numbers[0]) if many == 1 else list(pool.map(compute, numbers))

    return batch


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _round_trips(own: Subject, repeats: int) -> list[tuple[str, float]]:
    """Times the way of a gate's token and choice to the host, and of K outputs back: between two programs, piece by
    piece and all of it, and by a callback of one program."""
    cfg, device = own.cfg, sharding(DEVICE)
    h, ids = jax.device_put((token(cfg).astype(cfg.np_dtype), np.arange(cfg.top_k, dtype=np.int32)), device)
    out = np.zeros((cfg.top_k, cfg.width), np.float32)
    gate = jax.jit(lambda h, ids: (h + 1, ids + 1))
    after = jax.jit(lambda h, out: h + out.sum(axis=0).astype(h.dtype))
    made = jax.device_put(out, device)

    def whole() -> Any:
        h_there, _ = read = gate(h, ids)
        jax.device_get(read)
        return after(h_there, jax.device_put(out, device))

    def two_programs() -> Any:
        return after(gate(h, ids)[0], made)

    def timed(call: Callable[[], Any]) -> float:
        return median_s(call, repeats, unmeasured=3)

    plain_s = timed(two_programs)
    found = [
        ("a program, waited for", timed(lambda: gate(h, ids))),
        ("a program, and its results read", timed(lambda: jax.device_get(gate(h, ids)))),
        ("outputs to the device", timed(lambda: jax.device_put(out, device))),
        ("two programs, nothing between", plain_s),
        ("two programs, the host between", whole_s := timed(whole)),
        ("host between two programs", max(whole_s - plain_s, 0.0)),
    ]
    times = 8 if repeats < 50 else 64

    @jax.jit
    def inside(h: jax.Array, ids: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(out.shape, out.dtype)

        def step(_: Any, h: jax.Array) -> jax.Array:
            return h + jax.pure_callback(lambda h, ids: out, shape, h, ids).sum(axis=0).astype(h.dtype)

        return lax.fori_loop(jnp.int32(0), jnp.int32(times), step, h)

    return [*found, ("callback inside a program", timed(lambda: inside(h, ids)) / times)]
