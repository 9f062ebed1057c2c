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
from specmd_jax.moe.kernels import blocks, many_tokens, one_token
from specmd_jax.moe.kernels.launch import Shape
from specmd_jax.moe.kernels.many_tokens import COPY, HELD, MISSING, Chosen
from specmd_jax.moe.kernels.placed import Placed
from specmd_jax.moe.model import quant
from specmd_jax.moe.model.experts import Expert, expert_spec, pair_outputs, stacked

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

MANY = [  # for several tokens, with `SMALL` blocks
    ("float32", "olmoe", "float32", 64, 48),
    ("bfloat16", "olmoe", "bfloat16", 96, 48),
    ("float16", "gpt_oss", "float16", 96, 80),
    ("int8", "olmoe", "float32", 96, 64),
    ("int4", "olmoe", "float32", 192, 64),
    ("int4", "gpt_oss", "bfloat16", 320, 192),
    ("mxfp4", "gpt_oss", "bfloat16", 96, 160),
    ("mxfp4", "olmoe", "float32", 128, 64),
]
MANY_NAMES = [f"{precision}-{family}-{width}" for precision, family, _, width, _ in MANY]
SMALL = Shape(16, 32), Shape(32, 64)
EVERYBODYS = 5  # the expert that every token of `routed` has


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


def routed(cfg: Any, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Hidden states, and experts by token: one has all tokens, some have none, and a choice is left out."""
    rng = np.random.default_rng(tokens)
    rest = [rng.choice(np.arange(1, EVERYBODYS), cfg.top_k - 1, replace=False) for _ in range(tokens)]
    ids = np.concatenate([np.full((tokens, 1), EVERYBODYS), np.stack(rest)], axis=1)
    ids[tokens // 2, 1] = -1
    return jnp.asarray(rng.standard_normal((tokens, cfg.width)), cfg.np_dtype), jnp.asarray(ids, jnp.int32)


def near(cfg: Any, got: Any, wanted: Any) -> None:
    """As `close`, but a hidden value of 16 bits may be rounded the other way."""
    wide = cfg.np_dtype == np.float32
    atol = (1e-5 if wide else 2e-3) * float(jnp.abs(wanted).max())
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=atol, rtol=0)


def ints(*values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


@pytest.mark.parametrize("form", MANY, ids=MANY_NAMES)
def test_several_tokens(form: tuple[str, str, str, int, int]) -> None:
    """All experts of a launch in slots, or missing, each with a slot or two slots for all; one is copied ahead."""
    cfg, host = host_experts(*form)
    h, ids = routed(cfg, 20)
    pairs, experts = many_tokens.sort_pairs(cfg.experts, ids), np.arange(cfg.experts)
    garbage = jax.tree.map(lambda leaf: leaf[::-1][: cfg.experts + 1], host)
    nothing = jnp.zeros((ids.size, cfg.width), jnp.float32)
    kinds, own = {"held": HELD, "missing": MISSING, "passing": MISSING}, LAYER * cfg.experts + experts

    @jax.jit
    def launch(chosen: Chosen, slots: Expert) -> tuple[jax.Array, Expert]:
        return many_tokens.experts(cfg, h, pairs, chosen, host, slots, nothing, interpret=True, shapes=SMALL)

    outputs = []
    for name, what in kinds.items():
        begin, slot = [*experts, cfg.experts], [*experts, cfg.experts]
        end = [place + 1 for place in begin]
        if name == "passing":  # two lanes, and the copy's
            half = cfg.experts // 2
            slot = [*(experts // half), cfg.experts]
            begin, end = [0, half, *[0] * (cfg.experts - 2), cfg.experts], [half, *[0] * cfg.experts]
            end[1], end[-1] = cfg.experts, cfg.experts + 1
        chosen = Chosen(
            ints(*begin), ints(*end), ints(*experts, 0), ints(*own, 2), ints(*slot), ints(*[what] * cfg.experts, COPY)
        )
        places = dict(zip(slot, [*own.tolist(), 2], strict=True))  # the last of a lane stays in its slot
        slots = put(garbage, host, places | {cfg.experts: 0}) if what == HELD else garbage
        out, kept = launch(chosen, slots)
        same(kept, put(garbage, host, places))
        outputs.append(out)
    layer = jax.tree.map(lambda leaf: leaf[LAYER * cfg.experts :], host)
    near(cfg, outputs[0].reshape(*ids.shape, -1), pair_outputs(cfg, h, ids, stacked(layer)))
    same(outputs[1:], outputs[:1] * 2)  # not a bit depends on where an expert was


@pytest.mark.parametrize("tokens", [2, 9, 70])
def test_a_visit_of_several_tokens(tokens: int) -> None:
    """Experts that stay, leave, come and pass through; a copy takes the slot of a hit that leaves."""
    cfg, host = host_experts(*MANY[0])
    h, ids = routed(cfg, tokens)
    demanded = set(np.asarray(ids).reshape(-1).tolist()) - {-1}
    flat = {expert: LAYER * cfg.experts + expert for expert in demanded}
    garbage = jax.tree.map(lambda leaf: leaf[::-1][:9], host)
    layer = jax.tree.map(lambda leaf: leaf[LAYER * cfg.experts :], host)
    wanted = pair_outputs(cfg, h, ids, stacked(layer))

    @jax.jit
    def visit(placed: Placed, slots: Expert) -> tuple[jax.Array, Expert]:
        return many_tokens.visit_experts(cfg, ints(LAYER), h, ids, placed, host, slots, interpret=True)

    def placed(held: dict[int, int], stays: dict[int, int], spare: tuple[int, ...]) -> Placed:
        slot_of = {expert: slot for expert, slot in (held | stays).items() if expert in demanded}
        return Placed(
            slot=ints(*[slot_of.get(expert, -1) for expert in range(cfg.experts)]),
            missing=ints(*[int(expert in demanded and expert not in held) for expert in range(cfg.experts)]),
            coming=ints(3, -1),
            coming_slot=ints(0, -1),
            spare=ints(*spare),
        )

    cases = [
        ({EVERYBODYS: 0, 1: 2}, {3: 4}, (-1, 6, -1)),
        ({1: 0, 3: 1}, {EVERYBODYS: 4, 2: 5}, (6, 7, 8)),
        ({}, {}, (7, -1, 8)),
    ]
    outputs = []
    for held, stays, spare in cases:
        here = {slot: flat[expert] for expert, slot in held.items() if expert in flat}
        out, slots = visit(placed(held, stays, spare), put(garbage, host, here))
        near(cfg, out, wanted)
        come = {slot: flat[expert] for expert, slot in stays.items() if expert in flat}
        expected = put(garbage, host, here | come | {0: 3})
        passed = {slot: 0 for slot in spare if slot >= 0}  # whatever is in there
        same(put(slots, host, passed), put(expected, host, passed))
        outputs.append(out)
    same(outputs[1:], outputs[:1] * 2)
    assert not np.asarray(outputs[0])[np.asarray(ids) < 0].any()


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


def test_small_matrices_are_refused_for_several_tokens() -> None:
    cfg = dataclasses.replace(moe.tiny("olmoe"), width=96, expert_width=48)
    assert many_tokens.serves(cfg, expert_spec(cfg)) is None
    odd = dataclasses.replace(cfg, expert_width=40)
    assert many_tokens.serves(odd, expert_spec(odd)) == "matrices of 40 rows, expected a multiple of 16"
    thin = expert_spec(cfg)._replace(down=quant.matrix_spec(96, 16, "int4", 8))
    assert many_tokens.serves(cfg, thin) == "matrices of 8 codes in a row, expected at least 16"


GPU = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))


@pytest.mark.parametrize("form", MANY, ids=MANY_NAMES)
def test_several_tokens_lower_for_a_gpu(form: tuple[str, str, str, int, int]) -> None:
    precision, family, dtype, _, _ = form
    width, inner = (2880, 2880) if family == "gpt_oss" else (2048, 1024)
    cfg = dataclasses.replace(moe.tiny(family, dtype), width=width, expert_width=inner)
    one = expert_spec(cfg, precision)
    host, slots = (
        jax.tree.map(lambda leaf, count=count: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), one)
        for count in (LAYERS * cfg.experts, 6)
    )
    numbers = jax.ShapeDtypeStruct((cfg.experts,), jnp.int32)
    layer, ids = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (64, cfg.top_k)))
    h = jax.ShapeDtypeStruct((64, width), cfg.np_dtype)

    def call(layer: Any, h: Any, ids: Any, placed: Placed, host: Expert, slots: Expert) -> Any:
        return many_tokens.visit_experts(cfg, layer, h, ids, placed, host, slots)

    with jax.sharding.use_abstract_mesh(GPU):
        traced = jax.jit(call, donate_argnums=5).trace(layer, h, ids, Placed(*[numbers] * 5), host, slots)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "experts_gate_up" in text and "experts_down" in text


def test_they_lower_for_a_gpu() -> None:
    with jax.sharding.use_abstract_mesh(GPU):
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
