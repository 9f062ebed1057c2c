"""Tiny models with their experts in host memory, and what every engine that runs them must give."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false
from __future__ import annotations

import functools

import jax
import numpy as np

from specmd_jax import moe

KEY, PROMPT, STEPS = jax.random.key(7), 9, 5


@functools.cache
def made(family, dtype):
    """A tiny model, its experts as stacks, two prompts, and what the all-resident model makes of them."""
    cfg = moe.tiny(family, dtype)
    params, stacks = moe.random_params(cfg, KEY), moe.random_stacks(cfg, KEY)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocabulary, PROMPT) for _ in range(2)]
    whole = [moe.generate(cfg, params, stacks, prompt[None], STEPS) for prompt in prompts]
    return cfg, params, stacks, prompts, whole


def router_logits(whole):
    """[N, L, E] in the order of a trace."""
    rows = [(np.asarray(g.prefill.logits)[:, 0].swapaxes(0, 1), np.asarray(g.decode.logits)[:, :, 0, 0]) for g in whole]
    return np.concatenate([part for row in rows for part in row])


def check_run(engine, run, whole, bits=True):
    """The all-resident model's text (and router logits, bit for bit), and the simulator's events one by one."""
    np.testing.assert_array_equal(run.tokens, np.concatenate([g.tokens for g in whole]))
    if bits:
        np.testing.assert_array_equal(run.trace.logits, router_logits(whole))  # at every gate of every token
    replays, events = engine.policy.replay(run.trace)
    for name in ("level", "outcome", "collision", "evictions"):
        np.testing.assert_array_equal(np.stack([getattr(d, name) for d in run.decisions]), getattr(events, name))
    if events.prefetched is not None:
        np.testing.assert_array_equal(np.stack([d.prefetched for d in run.decisions]), events.prefetched)
    assert run.events_equal(events) and run.visit_s.shape == (replays.schedule.visits,)
    assert run.most_resident <= engine.capacity_slots + engine.staging
