"""Synthetic routing with a model's own locality hits as the model's does; a cache that was filled holds everything."""

from __future__ import annotations

import numpy as np
import pytest

from specmd_jax import run
from specmd_jax.errors import SpecmdError
from specmd_jax.specs.models import MODELS
from specmd_jax.trace import synthesize, validate
from specmd_jax.trace.filling import with_filling
from specmd_jax.trace.locality import LOCALITY, locality_of, lru_hits
from specmd_jax.types import Trace


def routed(name: str, tokens: int, requests: int) -> Trace:
    row = LOCALITY[name]
    return synthesize(
        layers=4,
        experts=row.experts,
        top_k=row.top_k,
        tokens=tokens,
        requests=requests,
        **row.knobs._asdict(),
    )


@pytest.mark.parametrize("name", LOCALITY)
def test_lru_hits_as_it_was_read_from_the_model(name: str) -> None:
    """Within 6 points in one long request and 7 in short ones, where a new topic comes more often."""
    for tokens, requests, points in ((2000, 1, 0.06), (60, 6, 0.07)):
        trace = routed(name, tokens, requests)
        for slots, read in LOCALITY[name].lru.items():
            assert lru_hits(trace, slots, skip=120) == pytest.approx(read, abs=points), (tokens, slots)


def test_rows_are_of_listed_models_in_their_shape() -> None:
    for name, row in LOCALITY.items():
        assert (MODELS[name].experts, MODELS[name].top_k) == (row.experts, row.top_k)


def test_an_unlisted_model_takes_the_nearest_shape() -> None:
    assert locality_of("OLMoE-1B-7B", 1, 1) == (LOCALITY["OLMoE-1B-7B"].knobs, None)
    assert locality_of("DeepSeek-V3", 256, 8) == (LOCALITY["Qwen3-30B-A3B"].knobs, "Qwen3-30B-A3B")
    assert locality_of("mine", 16, 1)[1] == "Phi-3.5-MoE"


def test_lru_by_hand() -> None:
    ids = np.array([[[0, 1]], [[0, 2]], [[1, 2]], [[0, 1]]], np.int16)
    trace = synthesize(layers=1, experts=3, top_k=2, tokens=4)
    trace = Trace(ids, trace.lengths, trace.prompt_lengths, 3, trace.expert_bytes)
    assert lru_hits(trace, 2) == 3 / 8  # 0 at the second token, 2 at the third, 1 at the fourth
    assert lru_hits(trace, 3, skip=2) == 1


@pytest.mark.parametrize(("experts", "top_k", "batch"), [(8, 2, 1), (7, 3, 1), (9, 2, 2), (8, 8, 3)])
def test_filling_asks_for_every_expert_popular_ones_last(experts: int, top_k: int, batch: int) -> None:
    trace = synthesize(layers=3, experts=experts, top_k=top_k, tokens=30, requests=4, prompt_tokens=3, with_ahead=True)
    filled, tokens = with_filling(trace, batch)
    validate(filled)
    assert filled.requests == batch + 4 and filled.tokens == tokens + trace.tokens
    np.testing.assert_array_equal(filled.expert_ids[tokens:], trace.expert_ids)
    for layer in range(3):
        assert set(filled.expert_ids[:tokens, layer].ravel()) == set(range(experts))
        busiest = np.argsort(-np.bincount(trace.expert_ids[:, layer].ravel(), minlength=experts), kind="stable")
        assert filled.expert_ids[tokens - 1, layer].tolist() == busiest[:top_k].tolist()
    cell = run(filled, capacity="100%", batch=batch, warmup_tokens=tokens, hardware="pcie4-x16")
    assert (cell.misses, cell.stall_s) == (0, 0)
    with pytest.raises(SpecmdError, match="batch is 0"):
        with_filling(trace, 0)
