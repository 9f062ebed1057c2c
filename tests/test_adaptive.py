"""The policies that adapt to a model: event for event as the reference, over resets, and what they are for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from parity import compare, small_trace

from specmd_jax import run
from specmd_jax.learn.evaluation import hits_by_request, recall_by_request
from specmd_jax.policies.choice import Mix
from specmd_jax.setting import Setting
from specmd_jax.trace import select_requests, synthesize
from specmd_jax.types import Trace


@pytest.mark.parametrize(("scope", "reset"), [("global", True), ("layer", False)])
def test_adaptive_equals_the_reference(scope: str, reset: bool) -> None:
    numbers = {"eviction": {"fade": 0.8, "rate": 1.0}, "prefetch": {"rate": 0.9}, "selection": {"count": 2.0}}
    budget = 420_000 if scope == "global" else np.array([130_000, 80_000, 125_000, 95_000])
    mix = Mix.of("adaptive", "adaptive", numbers=numbers)
    compare(small_trace(2, tokens=16), mix, budget, horizon=3, schedule={"reset_per_request": reset})


def test_it_corrects_a_trained_predictor_as_the_reference_does() -> None:
    numbers = {"eviction": {"checkpoint": "", "rate": 0.05}}
    compare(small_trace(4, tokens=16), Mix.of("adaptive", "none", numbers=numbers), 300_000)


def test_more_layers_and_fewer_experts_than_it_looks_at() -> None:
    trace = small_trace(3, layers=15, experts=5, tokens=6, expert_bytes=40960)
    compare(trace, Mix.of("adaptive", "adaptive"), 15 * 2 * 40960, horizon=1)


def following(requests: int) -> Trace:
    """Two experts follow each of 24, either of them by chance: frequency and recency tell little, pairs tell all."""
    rng = np.random.default_rng(5)
    follows = np.stack([rng.permutation(24), rng.permutation(24)], axis=1)
    turn = np.zeros(40 * requests, np.int64)
    for token in range(1, len(turn)):
        turn[token] = follows[turn[token - 1], rng.integers(2)]
    ids = np.stack([turn, (turn + 7) % 24], axis=1)[:, :, None].astype(np.uint8)
    made = synthesize(layers=2, experts=24, top_k=1, tokens=40, requests=requests)
    return replace(made, expert_ids=ids)


def test_adaptive_learns_what_a_trace_does() -> None:
    cell: dict[str, Any] = {"capacity": "50%", "scope": "layer", "hardware": None}
    rates = {
        name: run(following(4), eviction=name, **cell).hit_rate for name in ("lru", "lfu_decay", "online", "adaptive")
    }
    assert rates["adaptive"] > rates["online"] > max(rates["lru"], rates["lfu_decay"])


def test_weights_outlast_a_reset_and_nothing_else_does() -> None:
    trace, last = following(12), select_requests(following(12), [11])
    cell: dict[str, Any] = {"capacity": "50%", "scope": "layer"}
    budget = [Setting(**cell).budget(trace)]
    hits = {name: hits_by_request(trace, name, budget)[0] for name in ("adaptive", "online")}
    alone = {name: hits_by_request(last, name, budget)[0, 0] for name in ("adaptive", "online")}
    assert hits["adaptive"][11] > alone["adaptive"]
    assert hits["online"][11] == alone["online"]
    by_scan = run(trace, eviction="adaptive", hardware=None, reset_per_request=True, engine="scan", **cell)
    assert by_scan.hits == hits["adaptive"].sum()


def test_recall_grows_over_requests() -> None:
    trace = following(6)
    found, used = recall_by_request(trace, "adaptive", [1])
    share = found.sum(axis=1) / used.sum(axis=1)
    assert share[0] < 0.3 and share[-1] > 0.7  # a guess among two for the first layer, the second follows from it
    np.testing.assert_array_equal(recall_by_request(select_requests(trace, [0]), "adaptive", [1])[0], found[:1])
