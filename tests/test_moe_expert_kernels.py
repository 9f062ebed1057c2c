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
from specmd_jax.moe.kernels.placed import Placed
from specmd_jax.moe.model import quant
from specmd_jax.moe.model.experts import Expert, pair_outputs, stacked

LAYERS, LAYER = 2, 1
FEW = Shape(8, 32)  # codes at a time: several blocks in rows that are quick to run through

FORMS = [  # precision, family, dtype, width, expert width: whole blocks, and rows that end inside of one
    ("float32", "olmoe", "float32", 64, 48),
    ("bfloat16", "olmoe", "bfloat16", 384, 48),
    ("float16", "gpt_oss", "float16", 96, 80),
    ("int8", "olmoe", "float32", 96, 64),
    ("int4", "olmoe", "float32", 192, 64),
    ("int4", "gpt_oss", "bfloat16", 384, 320),
    ("mxfp4", "gpt_oss", "bfloat16", 480, 96),
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
        host = Expert(mxfp4(2 * inner, width), mxfp4(width, inner), *biases)
    else:
        host = Expert(noise(count, 2 * inner, width), noise(count, width, inner), *biases)
        host = host if precision == dtype else quantize_store([host], precision)[0]
    host = host._replace(gate_up=quant.words(host.gate_up), down=quant.words(host.down))
    return cfg, jax.tree.map(jnp.asarray, host)


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


def alike(form: tuple[str, str, str, int, int], outputs: list[Any]) -> None:
    """The same bits; of half-byte codes XLA on CPU, which interprets the kernels, contracts products as it goes."""
    if form[0] in ("int4", "mxfp4"):
        for out in outputs[1:]:
            close(out, outputs[0])
    else:
        same(outputs[1:], outputs[:1] * (len(outputs) - 1))


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
    outputs, shapes = [], (FEW, FEW) if form[0] in ("int4", "mxfp4") else (None, None)
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
        out, kept = one_token.experts(cfg, h, visit, host, slots, interpret=True, shapes=shapes)
        everything = {slot: LAYER * cfg.experts + e for e, slot in own.items()} | ahead
        same(kept, put(garbage, host, everything))
        outputs.append(out)
    layer = jax.tree.map(lambda leaf: leaf[LAYER * cfg.experts :], host)
    wanted = pair_outputs(cfg, h, jnp.asarray(chosen, jnp.int32)[None], stacked(layer))
    close(outputs[0], wanted)
    alike(form, outputs)  # nothing depends on where an expert was

    none = visit._replace(ids=visit.ids.at[0].set(-1))
    out, _ = one_token.experts(cfg, h, none, host, slots, interpret=True, shapes=shapes)
    alike(form, [outputs[2][:, 1:], out[:, 1:]])


def routing(cfg: Any, tokens: int, rng: Any) -> Any:
    """[N, K] ids: one expert has every token, some have none."""
    ids = np.stack([rng.permutation(cfg.experts - 3)[: cfg.top_k] + 1 for _ in range(tokens)])
    ids[:, 0] = 0
    return jnp.asarray(ids, jnp.int32)


def in_places(cfg: Any, host: Expert, ids: Any, held: int, kept: int) -> tuple[Placed, Expert, dict[int, int]]:
    """Demanded experts: the first ``held`` are on the device, as many as ``kept`` more come and stay, the others pass
    through, and two are copied ahead. What is placed, the slots before, and the slots' contents after (spare ones
    apart)."""
    chosen, spare, base = np.unique(ids), cfg.top_k, LAYER * cfg.experts
    slot, missing = np.full(cfg.experts, -1), np.zeros(cfg.experts)
    slot[chosen[: held + kept]] = 2 + np.arange(min(held + kept, chosen.size))
    missing[chosen[held:]] = 1
    count = 2 + cfg.experts + spare
    placed = Placed(
        *(jnp.asarray(column, jnp.int32) for column in (slot, missing, [0, 3, -1, -1], [0, 1, -1, -1])),
        spare=jnp.arange(count - spare, count, dtype=jnp.int32),
    )
    garbage = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype) + 1, host)
    after = {0: 0, 1: 3} | {int(slot[e]): base + int(e) for e in chosen if slot[e] >= 0}
    return placed, put(garbage, host, {int(slot[e]): base + int(e) for e in chosen[:held]}), after


@pytest.mark.parametrize(
    ("form", "tokens"),
    [
        *((form, 5) for form in FORMS),
        *(pytest.param(form, 70, marks=pytest.mark.slow) for form in (FORMS[1], FORMS[4])),
    ],
    ids=[*NAMES, f"{NAMES[1]}-70", f"{NAMES[4]}-70"],
)
def test_many_tokens(form: tuple[str, str, str, int, int], tokens: int) -> None:
    """Wherever the experts are the outputs have the same bits, and the slots what the host has."""
    cfg, host = host_experts(*form)
    rng = np.random.default_rng(2)
    ids = routing(cfg, tokens, rng)
    h = jnp.asarray(rng.standard_normal((tokens, cfg.width)), cfg.np_dtype)
    layer = jax.tree.map(lambda leaf: leaf[LAYER * cfg.experts :], host)
    outputs, everybody = [], np.unique(ids).size
    for held, kept in ((everybody, 0), (2, 2), (0, everybody), (0, 0)):
        placed, slots, after = in_places(cfg, host, ids, held, kept)
        out, new = many_tokens.visit_experts(
            cfg, jnp.asarray([LAYER], jnp.int32), h, ids, placed, host, slots, interpret=True
        )
        wanted = put(slots, host, after)
        same(*(jax.tree.map(lambda leaf: leaf[: -cfg.top_k], tree) for tree in (new, wanted)))  # but the spare ones
        outputs.append(out)
    alike(form, outputs)
    wanted = pair_outputs(cfg, h, ids, stacked(layer))
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(outputs[0], wanted, atol=(1e-5 if cfg.dtype == "float32" else 1e-2) * scale, rtol=0)


def test_pairs_without_an_expert_are_left_out() -> None:
    cfg, host = host_experts(*FORMS[0])
    rng = np.random.default_rng(3)
    ids = routing(cfg, 4, rng)
    h = jnp.asarray(rng.standard_normal((4, cfg.width)), cfg.np_dtype)
    outputs = []
    for given in (ids, ids.at[1, 0].set(-1).at[2, 1].set(-1)):
        placed, slots, _ = in_places(cfg, host, ids, 2, 2)
        call = cfg, jnp.asarray([LAYER], jnp.int32), h, given, placed, host, slots
        outputs.append(np.array(many_tokens.visit_experts(*call, interpret=True)[0]))
    assert (outputs[1][1, 0] == 0).all() and (outputs[1][2, 1] == 0).all() and (outputs[0][1, 0] != 0).any()
    outputs[0][1, 0] = outputs[0][2, 1] = 0
    np.testing.assert_array_equal(*outputs)


def test_decoded_codes_are_the_models() -> None:
    """Every code of the packed forms, with scales from the smallest to large ones."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 256).repeat(4, axis=1)
    mxfp4 = quant.MXFP4(codes, np.array([0, 1, 127, 240], np.uint8)[None, :, None].repeat(16, axis=2))
    scales = np.asarray(jnp.asarray([[[0.0], [1e-30], [0.1], [1e30]]], jnp.bfloat16))
    for leaf in (mxfp4, quant.Int4(codes, scales.repeat(16, axis=2)), quant.Int8(codes.view(np.int8), scales)):
        whole = np.concatenate([np.asarray(block) for block in quant.column_blocks(leaf)], axis=-1)[0]
        packed = quant.words(leaf)
        again = np.concatenate([np.asarray(block) for block in quant.column_blocks(packed)], axis=-1)[0]
        np.testing.assert_array_equal(again, whole)
        own = blocks.cut(packed, 64)
        planes = blocks.decoded(packed, own, blocks.load(_Plain.of(packed), own, 0, 0, 4, 0))
        for values, offset in zip(planes, own.offsets, strict=True):
            np.testing.assert_array_equal(np.asarray(values), whole[:, offset + own.stride * np.arange(64)])


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


def test_matrices_of_odd_heights_are_refused() -> None:
    cfg, host = host_experts("float32", "olmoe", "float32", 64, 40)
    assert many_tokens.serves(cfg, host) == "matrices of 40 rows, expected a multiple of 16"


def test_codes_in_odd_groups_are_refused() -> None:
    plain = jax.ShapeDtypeStruct((4, 48), jnp.bfloat16)
    served = Expert(plain, plain)
    assert one_token.serves(served) is None

    def reason(precision: str, group: int | None, columns: int = 48) -> str | None:
        matrix = quant.quantize(np.ones((4, columns), np.float32), precision, group)
        return one_token.serves(served._replace(down=quant.words(matrix)))

    assert reason("int8", None) is None and reason("int4", 8) is None
    assert reason("int8", 24) == "scales of 6 words of codes, expected a power of two or a whole row"
    assert reason("int8", 2) == "scales of 0.5 words of codes, expected a power of two or a whole row"
    assert reason("int4", 2, 12) == "rows of 6 bytes of codes, expected whole words of 4"


def test_they_lower_for_a_gpu() -> None:
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        for form in (FORMS[1], FORMS[3], FORMS[5], FORMS[6]):
            cfg, host = host_experts(*form)
            ints = jnp.zeros(8, jnp.int32)
            placed = Placed(jnp.zeros(cfg.experts, jnp.int32), jnp.zeros(cfg.experts, jnp.int32), ints, ints, ints)
            visit = one_token.Visit(ints[:1], ints[: cfg.top_k], placed)
            h = jnp.zeros((1, cfg.width), cfg.np_dtype)

            def call(h: Any, visit: Any, host: Any, slots: Any, cfg: Any = cfg) -> Any:
                return one_token.experts(cfg, h, visit, host, slots)

            text = jax.jit(call).trace(h, visit, host, host).lower(lowering_platforms=("cuda",)).as_text()
            assert "expert_gate_up" in text and "expert_down" in text
            ids, many = jnp.zeros((40, cfg.top_k), jnp.int32), jnp.zeros((40, cfg.width), cfg.np_dtype)

            def grouped(h: Any, ids: Any, placed: Any, host: Any, slots: Any, cfg: Any = cfg) -> Any:
                return many_tokens.visit_experts(cfg, placed.slot[:1], h, ids, placed, host, slots)

            traced = jax.jit(grouped).trace(many, ids, placed, host, host)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert "experts_gate_up" in text and "experts_down" in text
