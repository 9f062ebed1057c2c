"""Tokens are heard as they come, and a run that ends early is the beginning of the longer one, in every array."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportCallIssue=false
from __future__ import annotations

import functools

import numpy as np
import pytest
from moe_cases import STEPS, made

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused import serving
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import predict
from specmd_jax.moe.runtime import store

ENGINES = ("layerwise", "fused")


@functools.cache
def engine(name):
    cfg, params, stacks, *_ = made("olmoe", "float32")
    if name == "fused":
        return Fused(cfg, params, store.stack(cfg, stacks), capacity="40%", prefetch="gate_ahead", keep_logits=True)
    own = store.pin_stacks(cfg, stacks)
    return Offloaded(cfg, params, own, capacity="40%", prefetch="gate_ahead", keep_logits=True)


@functools.cache
def whole(name):
    *_, prompts, _ = made("olmoe", "float32")
    return engine(name).generate(prompts[:1], STEPS, keep_logits=True)


@pytest.mark.parametrize("name", ENGINES)
def test_every_token_is_heard_in_order(name):
    *_, prompts, _ = made("olmoe", "float32")
    heard = []
    run = engine(name).generate(prompts, STEPS, on_token=lambda *told: heard.append(told))
    assert heard == [(r, s, run.tokens[r, s]) for r in range(2) for s in range(STEPS)]
    np.testing.assert_array_equal(run.tokens[0], whole(name).tokens[0])


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("count", [1, 2, STEPS - 1, STEPS])
def test_a_run_that_ends_early_is_the_beginning_of_the_longer_one(name, count, monkeypatch):
    monkeypatch.setattr(serving, "AHEAD", 1 + count % 2)  # what runs too far is cut off
    *_, prompts, _ = made("olmoe", "float32")
    own, long, heard = engine(name), whole(name), []

    def listen(request, step, token):
        heard.append(token)
        return step == count - 1

    run = own.generate(prompts[:1], STEPS, keep_logits=True, on_token=listen)
    rows, visits = prompts[0].size + count - 1, count * long.trace.layers
    assert heard == run.tokens[0].tolist() and run.tokens.shape == (1, count)
    np.testing.assert_array_equal(run.tokens[0], long.tokens[0, :count])
    np.testing.assert_array_equal(run.logits, long.logits[:, :count])
    for column in ("expert_ids", "gates", "ahead", "logits"):
        np.testing.assert_array_equal(getattr(run.trace, column), getattr(long.trace, column)[:rows])
    assert run.trace.lengths.tolist() == [rows]
    assert len(run.decisions) == visits and run.visit_s.shape == (visits,) and (run.visit_s > 0).all()
    assert run.events_equal(own.policy.replay(run.trace)[1])
    assert run.most_resident <= long.most_resident
    took_s = run.ttft_s[0] + (count - 1) * (run.tpot_s[0] if count > 1 else 0)
    assert np.isclose(run.visit_s.sum(), took_s) or name == "layerwise"  # there the way to the first gate is no visit's
    assert run.visit_s.sum() <= took_s * (1 + 1e-9) and np.isnan(run.tpot_s[0]) == (count == 1)
    assert run.host_s is None or run.host_s.shape == (visits - long.trace.layers, 4)
    assert np.isfinite(predict.measured(run)[0])
    # the next run finds nothing of this one
    np.testing.assert_array_equal(own.generate(prompts[:1], STEPS).tokens, long.tokens)


@pytest.mark.parametrize("name", ENGINES)
def test_only_a_run_of_one_prompt_ends_early(name):
    *_, prompts, _ = made("olmoe", "float32")
    with pytest.raises(SpecmdError, match="on_token ends request 0 of 2 at step 1: only a run of one prompt may"):
        engine(name).generate(prompts, STEPS, on_token=lambda request, step, token: step == 1)
    run = engine(name).generate(prompts, STEPS, on_token=lambda request, step, token: step == STEPS - 1)
    assert run.tokens.shape == (2, STEPS)  # ending where it ends anyway is no early end


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_listener_raises_comes_out(name):
    *_, prompts, _ = made("olmoe", "float32")

    def listen(request, step, token):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        engine(name).generate(prompts[:1], STEPS, on_token=listen)


def test_a_given_text_has_no_listener():
    *_, prompts, _ = made("olmoe", "float32")
    with pytest.raises(SpecmdError, match="expected no text in their place"):
        engine("layerwise").generate(prompts[:1], 2, text=[[1, 2]], on_token=lambda *told: None)
