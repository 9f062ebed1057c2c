"""Tiny models with their experts in host memory, what every engine that runs them must give, and files of weights."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false
from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from specmd_jax import moe, safetensors
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.checkpoint.folder import INDEX, SINGLE
from specmd_jax.moe.model import families, quant
from specmd_jax.moe.model.forward import param_spec

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


def refused(match, call):
    """What is asked for is refused in one line."""
    with pytest.raises(SpecmdError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


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


def checkpoint_tensors(family, **changes):
    """Random tensors under the names and in the layout of the family's published checkpoints."""
    cfg, rng = families.tiny(family, **changes), np.random.default_rng(0)
    spec, tensors = param_spec(cfg), {}

    def noise(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    for path, name in families.dense_names(cfg, spec).items():
        tensors[name] = noise(*weights._at(spec, path).shape)
    inner, width = cfg.expert_width, cfg.width
    for layer in cfg.moe_layers:
        if families.FAMILIES[family].stacked:
            gate_up, down = families.expert_names(cfg, layer, 0)
            tensors |= {gate_up: noise(cfg.experts, width, 2 * inner), down: noise(cfg.experts, inner, width)}
            tensors |= {f"{gate_up}_bias": noise(cfg.experts, 2 * inner), f"{down}_bias": noise(cfg.experts, width)}
            continue
        for expert in range(cfg.experts):
            shapes = ((inner, width), (inner, width), (width, inner))
            for name, shape in zip(families.expert_names(cfg, layer, expert), shapes, strict=True):
                tensors[name] = noise(*shape)
    return tensors


def save(folder, family, tensors, shards=1, **changes):
    """Writes the folder of a checkpoint."""
    (folder / "config.json").write_text(json.dumps(families.tiny_hf(family, **changes)))
    names = sorted(tensors)
    if shards == 1:
        write_safetensors(folder / SINGLE, tensors)
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
