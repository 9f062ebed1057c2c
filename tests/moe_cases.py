"""Tiny models with their experts in host memory, what every engine that runs them must give, and files of weights."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false
from __future__ import annotations

import functools
import json

import jax
import numpy as np

from specmd_jax import moe
from specmd_jax.moe.checkpoint import safetensors, weights
from specmd_jax.moe.model import quant

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


def dequantize(leaf):
    """The matrix [.., out, in] that a leaf of an expert stands for, in float32."""
    return np.concatenate([np.asarray(block, np.float32) for block in quant.column_blocks(leaf)], axis=-1)


def quantize_store(store, precision, group=None):
    """A float store at another precision, expert by expert."""

    def one_layer(stack):
        rows = [jax.tree.map(lambda leaf, e=e: np.asarray(leaf[e]), stack) for e in range(stack.gate_up.shape[0])]
        encoded = [weights.quantize_expert(row, precision, group) for row in rows]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *encoded)

    return tuple(one_layer(stack) for stack in store)


def write_safetensors(path, tensors):
    """Writes tensors [by name] to a file of the format that `safetensors.TensorFile` reads."""
    names, header, offset = {dtype: name for name, dtype in safetensors.DTYPES.items()}, {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    path.unlink(missing_ok=True)  # a file that is replaced may still be mapped
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *(t.tobytes() for t in tensors.values())]))
