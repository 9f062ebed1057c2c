"""Attention over the context: its time in every decode pass, by hand and in every engine, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from parity import LINK, compare, costs, small_trace

from specmd_jax import run, stall_bounds, sweep
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.stall import layer_time_s
from specmd_jax.policies.choice import Mix
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.setting import Setting
from specmd_jax.soft.replay import given
from specmd_jax.specs.models import model
from specmd_jax.trace import save_trace
from specmd_jax.trace.stream import open_trace
from specmd_jax.types import DECODE, Trace

CONTEXT = 3000


def of_model(name: str = "gpt-oss-20b", **changes: Any) -> Trace:
    return replace(small_trace(3, **changes), meta={"model": name})


SCHEDULES = ({}, {"batch": 2}, {"contract": "sequential", "prefill_chunk": 2}, {"batch": 2, "drafts": Drafts(2, 0.6)})


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_scan_and_reference_agree(schedule: dict[str, Any]) -> None:
    for eviction, prefetch in (("lru", "none"), ("least_stale", "previous")):
        trace = of_model(requests=3, tokens=12)
        compare(trace, Mix.of(eviction, prefetch), 420_000, schedule={**schedule, "context": CONTEXT})


def test_the_dense_part_by_hand() -> None:
    spec, machine = model("gpt-oss-20b"), LINK.replace(memory_bytes_per_s=1e9, peak_flops_per_s=1e30)
    replays = prepare(of_model(), context=CONTEXT)
    # 12 layers see all of the context and 12 see 128 of it: 2 x 8 heads x 64 numbers of 2 bytes a token
    read_s = 12 * (CONTEXT + 128) * 2 * 8 * 64 * 2 / spec.layers / 1e9
    dense_s = spec.dense_bytes / 1e9 + machine.launch_s + machine.layer_s + machine.sync_s
    slow = costs(replays, machine)
    assert slow.dense_s(0, 1, requests=1) == pytest.approx(dense_s + read_s, rel=1e-6)
    assert slow.dense_s(0, 2, requests=2) == pytest.approx(dense_s + 2 * read_s, rel=1e-6)
    assert slow.dense_s(0, 2, requests=0) == pytest.approx(dense_s, rel=1e-6)


def test_no_context_is_the_same_program() -> None:
    replays, plain = prepare(of_model(), context=0), prepare(of_model())
    found = replays.costs(LINK)
    assert found is not None and found.context_read_s is None and found.context_flop_s is None
    assert all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(found, plain.costs(LINK) or (), strict=True)
    )


def test_every_way_of_replaying_has_it(tmp_path: Any) -> None:
    trace, cell = of_model(), {"hardware": LINK, "capacity": "40%", "phase": "decode"}
    rows = list(sweep(trace, context=[0, CONTEXT], **cell))
    assert [row["context"] for row in rows] == [0, CONTEXT] and rows[0]["misses"] == rows[1]["misses"]
    read_s = trace.layers * model("gpt-oss-20b").context_bytes(CONTEXT) / LINK.memory_bytes_per_s
    assert rows[1]["tpot_s"] - rows[0]["tpot_s"] == pytest.approx(read_s, rel=1e-3)
    save_trace(trace, tmp_path / "t.npz")
    streamed = run(open_trace(tmp_path / "t.npz"), context=CONTEXT, **cell)
    assert streamed.tpot_s == pytest.approx(rows[1]["tpot_s"], rel=1e-6)
    slow = LINK.replace(link_bytes_per_s=2e7)
    bounds, plain = (stall_bounds(trace, "40%", hardware=slow, phase="decode", context=n) for n in (8 * CONTEXT, 0))
    assert bounds.lower_s <= bounds.feasible_s < plain.feasible_s and bounds.lower_s < plain.lower_s
    part = prepare(trace, context=CONTEXT)
    assert layer_time_s(part, LINK) > layer_time_s(prepare(trace), LINK)
    soft, without = given([part], LINK).seconds, given([prepare(trace)], LINK).seconds
    assert soft is not None and without is not None
    assert jnp.array_equal(soft.dense_s[:, 0] > without.dense_s[:, 0], part.schedule.phase == DECODE)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Setting(context=-1), "context is -1, expected 0 to"),
        (lambda: Setting(context=1 << 40), "context is 1099511627776, expected 0 to"),
        (lambda: Setting(context=True), "context is True, expected a whole number"),
        (lambda: run(small_trace(3), context=8), "nothing is known of the attention of model 'synthetic'"),
        (lambda: list(sweep(small_trace(3), context=[0, 8])), "nothing is known of the attention"),
        (lambda: prepare(small_trace(3), context=8), "nothing is known of the attention"),
    ],
)
def test_contexts_that_cannot_be(act: Any, message: str) -> None:
    with pytest.raises(SpecmdError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)
