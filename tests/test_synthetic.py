"""Synthetic routing: each knob does what it says, measured on the routing alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.trace import synthesize, validate
from specmd_jax.types import Trace

SHAPE: dict[str, Any] = {"layers": 4, "experts": 16, "top_k": 3, "tokens": 600, "requests": 2, "seed": 5}


def make(**changes: Any) -> Trace:
    return synthesize(**SHAPE | changes)


def by_request(trace: Trace) -> np.ndarray:
    return trace.expert_ids.reshape(trace.requests, -1, trace.layers, trace.top_k)


def share_of_popular(trace: Trace) -> float:
    """Share of the routing that goes to the busiest quarter of each layer."""
    loads = [np.bincount(trace.expert_ids[:, layer].ravel(), minlength=trace.experts) for layer in range(trace.layers)]
    return float(np.sort(loads, axis=1)[:, -trace.experts // 4 :].sum() / np.sum(loads))


def repeats(trace: Trace) -> float:
    """Share of experts that the token before chose too."""
    ids = by_request(trace)
    return float((ids[:, 1:, :, :, None] == ids[:, :-1, :, None, :]).any(-1).mean())


def layer_recall(trace: Trace) -> float:
    """Recall on the second half of co-activation counts from layer to layer learned on the first half."""
    ids, half = trace.expert_ids.astype(int), trace.tokens // 2
    recalls = []
    for layer in range(trace.layers - 1):
        counts = np.zeros((trace.experts, trace.experts))
        np.add.at(counts, (ids[:half, layer, :, None], ids[:half, layer + 1, None, :]), 1)
        guess = np.argsort(-counts[ids[half:, layer]].sum(axis=1), axis=1)[:, : trace.top_k]
        recalls.append((guess[:, :, None] == ids[half:, layer + 1, None, :]).any(axis=1).mean())
    return float(np.mean(recalls))


def wandering(trace: Trace) -> float:
    """Mean total variation distance between the loads of successive tenths of a request."""
    parts = np.array_split(by_request(trace), 10, axis=1)
    loads = np.array([[(part == e).mean(axis=(1, 3)) for e in range(trace.experts)] for part in parts])
    return float(np.abs(np.diff(loads, axis=0)).sum(axis=1).mean() / 2)


@pytest.mark.parametrize(
    ("knob", "values", "measure", "sign"),
    [
        ("skew", (0.0, 0.5, 1.0, 2.0), share_of_popular, 1),
        ("stickiness", (0.0, 0.3, 0.6, 0.9), repeats, 1),
        ("layer_correlation", (0.0, 0.4, 0.7, 1.0), layer_recall, 1),
        ("drift", (0.0, 0.01), wandering, 1),
        ("topics", (1, 2, 8), share_of_popular, -1),
    ],
)
def test_a_knob_does_what_it_says(knob: str, values: Any, measure: Callable[[Trace], float], sign: int) -> None:
    around: dict[str, dict[str, Any]] = {
        "layer_correlation": {"skew": 0.0},
        "drift": {"skew": 3.0},
        "topics": {"skew": 3.0, "drift": 0.05},
    }
    measured = [measure(make(**around.get(knob, {}) | {knob: value})) for value in values]
    assert (sign * np.diff(measured) > 0.03).all(), measured


def test_without_structure_the_measures_are_those_of_chance() -> None:
    trace = make(tokens=3000, skew=0, stickiness=0, layer_correlation=0)
    chance = 3 / 16
    assert share_of_popular(trace) == pytest.approx(0.25, abs=0.02)
    assert repeats(trace) == pytest.approx(chance, abs=0.01)
    assert layer_recall(trace) == pytest.approx(chance, abs=0.02)
    assert wandering(trace) < 0.1


def test_extremes() -> None:
    frozen = make(stickiness=1.0, drift=0.0)
    ids = by_request(frozen)
    assert (ids == ids[:, :1]).all()
    assert layer_recall(make(skew=0.0, layer_correlation=1.0)) == 1.0


def test_experts_are_the_top_k_of_the_logits_and_gates_their_softmax() -> None:
    trace = make(with_logits=True)
    validate(trace)
    assert trace.logits is not None and trace.gates is not None
    np.testing.assert_array_equal(np.argsort(-trace.logits, axis=-1, kind="stable")[..., :3], trace.expert_ids)
    powers = np.exp(np.take_along_axis(trace.logits, trace.expert_ids.astype(int), -1).astype(np.float64))
    np.testing.assert_allclose(trace.gates, powers / powers.sum(axis=-1, keepdims=True), rtol=1e-5)
    assert (np.diff(trace.gates, axis=-1) <= 0).all()


def test_ahead_sees_the_next_layer_through_its_noise() -> None:
    recalls = []
    for noise in (0.0, 0.5, 2.0):
        trace = make(with_ahead=True, ahead_noise=noise)
        assert trace.ahead is not None
        np.testing.assert_allclose(trace.ahead[:, :-1].sum(axis=-1), 1, rtol=1e-5)
        assert not trace.ahead[:, -1].any()
        guess = np.argsort(-trace.ahead[:, :-1], axis=-1, kind="stable")[..., :3]
        recalls.append((guess[..., :, None] == trace.expert_ids[:, 1:, None, :]).any(axis=-1).mean())
    assert recalls[0] == 1.0 and recalls[1] < 0.95 and recalls[2] < recalls[1] - 0.1


def test_determined_by_its_arguments() -> None:
    plain = make()
    full = make(with_logits=True, with_ahead=True)
    np.testing.assert_array_equal(plain.expert_ids, full.expert_ids)
    np.testing.assert_array_equal(plain.gates, full.gates)
    assert (make(seed=6).expert_ids != plain.expert_ids).any()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(with_logits=True, with_ahead=True)
    monkeypatch.setattr("specmd_jax.trace.synthetic._BLOCK", 7 * 2 * 4 * 16)
    blocks = make(with_logits=True, with_ahead=True)
    np.testing.assert_array_equal(whole.logits, blocks.logits)
    np.testing.assert_array_equal(whole.ahead, blocks.ahead)


def test_shapes_and_bytes() -> None:
    trace = synthesize(layers=2, experts=300, top_k=1, tokens=5, requests=3, prompt_tokens=4, expert_bytes=[7, 8])
    validate(trace)
    assert trace.lengths.tolist() == [5, 5, 5] and trace.prompt_lengths.tolist() == [4, 4, 4]
    assert trace.expert_bytes.tolist() == [7, 8]
    assert make(expert_bytes=9).expert_bytes.tolist() == [9] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0, expected at least 1"),
        ({"top_k": 17}, "top_k is 17 with 16 experts"),
        ({"prompt_tokens": 601}, "prompt_tokens is 601, expected 0 to the 600 tokens"),
        ({"stickiness": 1.5}, "stickiness is 1.5, expected 0 to 1"),
        ({"drift": float("nan")}, "drift is nan, expected 0 to 1"),
        ({"skew": -1}, "skew is -1, expected a finite number >= 0"),
        ({"ahead_noise": float("inf")}, "ahead_noise is inf"),
        ({"topics": 0}, "topics is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"expert_bytes": [1, 2]}, "expert_bytes is [1, 2], expected an integer >= 1, or 4 of them"),
        ({"expert_bytes": 0}, "expert_bytes is 0"),
    ],
)
def test_bad_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        make(**changes)
    assert message in str(caught.value)
