"""Expert kernels: they compute the model's experts, and fill slots with what the host has, byte for byte."""

# pyright: reportArgumentType=false
from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from moe_cases import quantize_store

from specmd_jax import moe
from specmd_jax.moe.kernels import blocks, one_token
from specmd_jax.moe.kernels.placed import Placed
from specmd_jax.moe.model import quant
from specmd_jax.moe.model.experts import Expert, pair_outputs, stacked

LAYERS, LAYER = 2, 1

FORMS = [  # precision, family, dtype, width, expert width: whole blocks, and rows that end inside of one
    ("float32", "olmoe", "float32", 64, 48),
    ("bfloat16", "olmoe", "bfloat16", 384, 40),
    ("float16", "gpt_oss", "float16", 96, 80),
    ("int8", "olmoe", "float32", 96, 64),
    ("int4", "olmoe", "float32", 192, 64),
    ("int4", "gpt_oss", "bfloat16", 1344, 1088),
    ("mxfp4", "gpt_oss", "bfloat16", 1440, 96),
    ("mxfp4", "olmoe", "float32", 128, 64),
]
NAMES = [f"{precision}-{family}-{width}" for precision, family, _, width, _ in FORMS]


def host_experts(precision: str, family: str, dtype: str, width: int, inner: int) -> tuple[Any, Expert]:
    """A model's shape, and all its experts [L * E, ...] at a precision."""
    cfg, rng = dataclasses.replace(moe.tiny(family, dtype), width=width, expert_width=inner), np.random.default_rng(0)
    count = LAYERS * cfg.experts

    def noise(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.2).astype(cfg.np_dtype)

    def mxfp4(rows: int, columns: int) -> quant.MXFP4:
        codes = rng.integers(0, 256, (count, rows, columns // 2), dtype=np.uint8)
        return quant.MXFP4(codes, rng.integers(117, 126, (count, rows, columns // 32), dtype=np.uint8))

    biases = (noise(count, 2 * inner), noise(count, width)) if cfg.expert_bias else (None, None)
    if precision == "mxfp4":
        return cfg, jax.tree.map(jnp.asarray, Expert(mxfp4(2 * inner, width), mxfp4(width, inner), *biases))
    host = Expert(noise(count, 2 * inner, width), noise(count, width, inner), *biases)
    return cfg, jax.tree.map(jnp.asarray, host if precision == dtype else quantize_store([host], precision)[0])


def put(slots: Expert, host: Expert, places: dict[int, int]) -> Expert:
    """Slots with experts of the host in some ``places`` (slot -> flat id)."""

    def leaf(slots: Any, host: Any) -> Any:
        new = np.asarray(slots).copy()
        for slot, flat in places.items():
            new[slot] = np.asarray(host)[flat]
        return jnp.asarray(new)

    return jax.tree.map(leaf, slots, host)


def same(a: Any, b: Any) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=1e-5 * float(jnp.abs(wanted).max()), rtol=0)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_one_token(form: tuple[str, str, str, int, int]) -> None:
    """The experts' outputs wherever they are, one that is left out, and two that are copied ahead."""
    cfg, host = host_experts(*form)
    rng = np.random.default_rng(1)
    chosen = rng.choice(cfg.experts, cfg.top_k, replace=False)
    h = jnp.asarray(rng.standard_normal((1, cfg.width)), cfg.np_dtype)
    places = rng.permutation(LAYERS * cfg.experts)
    own = dict(zip(chosen.tolist(), places.tolist(), strict=False))  # expert -> slot
    ahead = {int(places[-1]): 0, int(places[-2]): 3}
    garbage = jax.tree.map(lambda leaf: leaf[::-1], host)
    outputs = []
    for missing in ([], chosen[:1].tolist(), chosen.tolist()):
        held = {slot: LAYER * cfg.experts + e for e, slot in own.items() if e not in missing}
        placed = Placed(
            slot=jnp.asarray([own.get(e, -1) for e in range(cfg.experts)], jnp.int32),
            missing=jnp.asarray([int(e in missing) for e in range(cfg.experts)], jnp.int32),
            coming=jnp.asarray([*ahead.values(), -1, -1], jnp.int32),
            coming_slot=jnp.asarray([*ahead, -1, -1], jnp.int32),
            spare=jnp.zeros(2, jnp.int32),
        )
        visit = one_token.Visit(jnp.asarray([LAYER], jnp.int32), jnp.asarray(chosen, jnp.int32), placed)
        slots = put(garbage, host, held)
        out, kept = one_token.experts(cfg, h, visit, host, slots, interpret=True)
        everything = {slot: LAYER * cfg.experts + e for e, slot in own.items()} | ahead
        same(kept, put(garbage, host, everything))
        outputs.append(out)
    layer = jax.tree.map(lambda leaf: leaf[LAYER * cfg.experts :], host)
    wanted = pair_outputs(cfg, h, jnp.asarray(chosen, jnp.int32)[None], stacked(layer))
    close(outputs[0], wanted)
    same(outputs[1:], outputs[:1] * 2)  # not a bit depends on where an expert was

    none = visit._replace(ids=visit.ids.at[0].set(-1))
    out, _ = one_token.experts(cfg, h, none, host, slots, interpret=True)
    same(out[:, 1:], outputs[0][:, 1:])


def test_decoded_codes_are_the_models() -> None:
    """Every code of the packed forms, with scales from the smallest to large ones."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 256).repeat(4, axis=1)
    mxfp4 = quant.MXFP4(codes, np.array([0, 1, 127, 240], np.uint8)[None, :, None].repeat(16, axis=2))
    int4 = quant.Int4(
        codes, np.asarray(jnp.asarray([[[0.0], [1e-30], [0.1], [1e30]]], jnp.bfloat16)).repeat(16, axis=2)
    )
    for leaf in (mxfp4, int4):
        own = blocks.cut(leaf, 256)
        planes = blocks.decoded(leaf, own, blocks.load(_Plain.of(leaf), own, 0, 0, 4, 0))
        whole = np.concatenate([np.asarray(block) for block in quant.column_blocks(leaf)], axis=-1)[0]
        for plane, values in enumerate(planes):
            at = plane * own.offset + own.stride * np.arange(256)
            np.testing.assert_array_equal(np.asarray(values), whole[:, at])


class _Plain:
    """An array that is read as a reference is."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape = array, array.shape

    @classmethod
    def of(cls, leaf: Any) -> Any:
        return type(leaf)(*(cls(part) for part in leaf))

    def __getitem__(self, where: tuple[Any, ...]) -> Any:
        expert, *slices = where
        return jnp.asarray(self.array)[expert][tuple(slice(s.start, s.start + s.size) for s in slices)]


def test_scales_of_odd_groups_are_refused() -> None:
    host = jax.ShapeDtypeStruct((4, 48), jnp.bfloat16)
    served = Expert(host, host)
    assert one_token.serves(served) is None
    odd = quant.matrix_spec(4, 48, "int8", 24)
    assert (
        one_token.serves(served._replace(down=odd)) == "24 codes share a scale, expected a power of two or a whole row"
    )
    assert one_token.serves(served._replace(down=quant.matrix_spec(4, 48, "int8"))) is None


def test_they_lower_for_a_gpu() -> None:
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        for form in FORMS[1:]:
            cfg, host = host_experts(*form)
            ints = jnp.zeros(8, jnp.int32)
            placed = Placed(jnp.zeros(cfg.experts, jnp.int32), jnp.zeros(cfg.experts, jnp.int32), ints, ints, ints)
            visit = one_token.Visit(ints[:1], ints[: cfg.top_k], placed)
            h = jnp.zeros((1, cfg.width), cfg.np_dtype)

            def call(h: Any, visit: Any, host: Any, slots: Any, cfg: Any = cfg) -> Any:
                return one_token.experts(cfg, h, visit, host, slots)

            text = jax.jit(call).trace(h, visit, host, host).lower(lowering_platforms=("cuda",)).as_text()
            assert "expert_gate_up" in text and "expert_down" in text
