"""The kernels of a decode step compute what the plain layers do; without a GPU they are interpreted, or lowered."""

# pyright: reportOptionalCall=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.kernels import attention as kernel
from specmd_jax.moe.kernels import decode, matvec, router
from specmd_jax.moe.kernels.rows import Tile
from specmd_jax.moe.model.forward import build, greedy_step, init_cache, param_spec
from specmd_jax.moe.model.layers import LayerCache
from specmd_jax.moe.model.routing import ROUTERS

KEY = jax.random.key(3)
POSITIONS = 24
SERVED = [family for family in moe.FAMILIES if decode.serves(moe.tiny(family)) is None]


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def made(family: str, dtype: str = "float32") -> tuple[moe.MoEConfig, Any]:
    cfg = moe.tiny(family, dtype)
    return cfg, moe.random_params(cfg, KEY)


def odd(dtype: str = "float32", **changes: Any) -> moe.MoEConfig:
    """A model none of whose widths is a power of two."""
    cfg = moe.tiny("qwen2_moe", dtype)
    rope = dataclasses.replace(cfg.rope, dim=10, interleaved=True)
    odd = dict(width=90, heads=6, kv_heads=2, head_dim=10, rope=rope, experts=11, shared_width=36, dense_width=52)
    return dataclasses.replace(cfg, **(odd | dict(vocabulary=102, qk_norm="full", qkv_clip=1.2) | changes))


def noise(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def full_cache(cfg: moe.MoEConfig, seed: int = 5) -> LayerCache:
    return LayerCache(*(noise(seed + n, a.shape, a.dtype) for n, a in enumerate(init_cache(cfg, 1, POSITIONS)[0])))


def position(start: int) -> jax.Array:
    return jnp.full(1, start, jnp.int32)


def assert_close(got: Any, wanted: Any) -> None:
    """Within 1e-5, or within two roundings of the type; integers are equal."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jnp.integer):
            np.testing.assert_array_equal(one, other)
            continue
        tolerance = 1e-5 if one.dtype == jnp.float32 else 2 * float(jnp.finfo(one.dtype).eps)
        a, b = (np.asarray(leaf, np.float64) for leaf in (one, other))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance / 2 * np.abs(b).max())


def compare_layer(cfg: moe.MoEConfig, params: Any, index: int, *starts: int) -> None:
    plain, own, weights = (
        build(cfg).layers[index],
        decode.layer_fns(cfg, interpret=True)[index],
        params["layers"][index],
    )
    x, cache = noise(index, (1, 1, cfg.width), cfg.np_dtype), full_cache(cfg)
    attend, wanted, h = jax.jit(own.attend), jax.jit(plain.attend), noise(9, (1, cfg.width), cfg.np_dtype)
    for start in starts:
        assert_close(attend(weights, x, cache, position(start)), wanted(weights, x, cache, position(start)))
    for name in ("route", "shared", "mlp"):
        theirs, ours = getattr(plain, name), getattr(own, name)
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert_close(jax.jit(ours)(weights, h), jax.jit(theirs)(weights, h))
    joint = decode.attend_route_fns(cfg, interpret=True)[index]
    assert (joint is None) == (plain.route is None)
    if joint is not None:
        got = joint(weights, x, cache, position(starts[-1]))
        assert_close(tuple(got)[:3], attend(weights, x, cache, position(starts[-1])))
        assert_close(tuple(got)[3:], jax.jit(plain.route)(weights, got.h))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SERVED)
def test_a_layer_is_the_plain_one(family, dtype):
    cfg, params = made(family, dtype)
    kinds = {(index in cfg.moe_layers, window): index for index, window in enumerate(cfg.windows)}
    for index in kinds.values():
        compare_layer(cfg, params, index, 0, 11, POSITIONS - 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "head", "norm": "layer", "qkv_bias": True, "out_bias": True, "router_bias": True},
        {"qk_norm": "none", "qkv_clip": 0.0, "sinks": True, "windows": (7, 1, 24), "dtype": "float16"},
        {"heads": 5, "kv_heads": 5, "router": "topk_softmax", "shared_gate": False, "dtype": "bfloat16"},
    ],
    ids=["full", "head", "sinks", "own keys"],
)
def test_widths_need_not_be_powers_of_two(changes):
    cfg = odd(**changes)
    params = moe.random_params(cfg, KEY)
    for index in (0, 1):
        compare_layer(cfg, params, index, 13, 2)


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_the_plain_one(family, dtype):
    cfg, params = made(family, dtype)
    x = noise(1, (1, cfg.width), cfg.np_dtype)
    got = jax.jit(decode.head_fn(cfg, interpret=True))(params["head"], x)
    assert got.dtype == jnp.float32
    wanted = jax.jit(build(cfg).head)(params["head"], x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 if dtype == "float32" else 2**-7)


@pytest.mark.parametrize("start", [0, 1, 5, 12, POSITIONS - 1])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("splits", [2, 4])
def test_positions_dealt_to_several_programs_give_the_same(splits, window, start):
    cfg, params = made("gpt_oss")
    own, cache = params["layers"][0]["attention"], full_cache(cfg)
    rows = tuple(
        noise(n, (1, heads * cfg.head_dim), "float32") for n, heads in enumerate([cfg.heads, *[cfg.kv_heads] * 2])
    )

    def run(share: kernel.Share) -> Any:
        return kernel.attention(cfg, window, own, rows, cache, position(start), share=share, interpret=True)

    assert_close(run(kernel.Share(splits, block=4)), run(kernel.Share(1, block=32)))


def test_a_long_cache_is_dealt_and_its_counters_come_from_the_projection(monkeypatch):
    monkeypatch.setattr(decode, "choose_share", lambda positions: kernel.Share(2, block=4))
    compare_layer(*made("olmoe"), 0, 19)
    assert kernel.choose_share(1024).splits == 1 and kernel.choose_share(4096).splits == 4


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe"])
def test_layers_in_one_array_are_read_and_written_at_their_place(family):
    cfg, params = made(family)
    index = cfg.layers - 1
    layers = [params["layers"][n] for n in (0, index)]
    stack, cache = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), full_cache(cfg)
    whole = jax.tree.map(lambda leaf: jnp.stack([leaf + 1, leaf]), cache)
    fns, at = decode.layer_fns(cfg, interpret=True)[index], decode.At(stack, jnp.int32(1))
    x = noise(2, (1, 1, cfg.width), cfg.np_dtype)
    wanted = fns.attend(layers[1], x, cache, position(9))
    got = fns.attend(at, x, whole, position(9))
    assert_close(got[:2], wanted[:2])
    assert_close(got[2], jax.tree.map(lambda old, new: jnp.stack([old[0], new]), whole, wanted[2]))
    assert_close(fns.route(at, got[1]), fns.route(layers[1], got[1]))
    if fns.shared is not None:
        assert_close(fns.shared(at, got[1]), fns.shared(layers[1], got[1]))


@pytest.mark.parametrize("tile", [Tile(1, 16), Tile(8, 32), Tile(4, 256)])
def test_a_tile_decides_nothing_but_the_order_of_sums(tile):
    cfg = odd()
    params = moe.random_params(cfg, KEY)
    own, row = params["layers"][0], noise(4, (1, cfg.width), "float32")
    linears = [own["attention"][name] for name in ("query", "key", "value")]
    x = matvec.Row(row, own["attention_norm"])
    got = matvec.project(x, linears, cfg.norm_eps, keep_normed=True, zeros=5, tile=tile, interpret=True)
    wide = np.asarray(row, np.float64)
    h = wide / np.sqrt((wide**2).mean() + cfg.norm_eps) * np.asarray(own["attention_norm"]["weight"], np.float64)
    np.testing.assert_allclose(got.normed, h, rtol=1e-5)
    for output, linear in zip(got.outputs, linears, strict=True):
        wanted = h @ np.asarray(linear["weight"], np.float64).T + np.asarray(linear["bias"], np.float64)
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.zeros, np.zeros(8, np.int32))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", pytest.param("phimoe", marks=pytest.mark.slow)])
def test_greedy_text_is_that_of_the_plain_model(family):
    cfg, params = made(family)
    stacks, steps, prompt = moe.random_stacks(cfg, KEY), 7, [[5, 17, 2, 40]]
    wanted = moe.generate(cfg, params, stacks, prompt, steps).tokens
    cache = init_cache(cfg, 1, 4 + steps - 1)
    x, cache, _ = moe.forward(build(cfg), params, stacks, jnp.asarray(prompt, jnp.int32), cache, position(0))
    token = jnp.argmax(build(cfg).head(params["head"], x[:, -1]), axis=-1).astype(jnp.int32)
    step, tokens = jax.jit(functools.partial(greedy_step, decode.net(cfg, interpret=True))), [int(token[0])]
    for start in range(4, 4 + steps - 1):
        token, _, cache, _ = step(params, stacks, token, cache, position(start))
        tokens.append(int(token[0]))
    np.testing.assert_array_equal([tokens], wanted)


# ---- the router ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", router.SERVED)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (64, 8), (512, 10), (3, 3)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_are_chosen_as_the_plain_router_does(name, experts, top_k, renormalize):
    cfg = dataclasses.replace(
        moe.tiny("olmoe"), router=name, experts=experts, top_k=top_k, renormalize=renormalize, gate_scale=1.5
    )
    choose = jax.jit(functools.partial(router.choose_experts, cfg, interpret=True))
    for seed in range(5):
        logits = noise(seed, (1, experts), jnp.float32) * 2
        if seed == 4:
            logits = jnp.round(logits)  # many ties
        (ids, gates), (wanted, shares) = choose(logits), ROUTERS[name](cfg, logits)
        np.testing.assert_array_equal(ids, wanted)
        np.testing.assert_allclose(gates, shares, rtol=1e-6)


@pytest.mark.parametrize("name", router.SERVED)
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_logits_that_are_not_finite_choose_no_expert_outside(name, value):
    cfg = dataclasses.replace(moe.tiny("olmoe"), router=name, experts=11)
    ids, _ = router.choose_experts(cfg, jnp.full((1, 11), value), interpret=True)
    assert (np.asarray(ids) >= 0).all() and (np.asarray(ids) < 11).all()


# ---- what is refused, and a GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"heads": 5}, "do not share"), ({"head_dim": 12}, "rotates all"), ({"width": 8200}, "up to 8192")],
)
def test_what_is_not_served_is_said(changes, reason):
    cfg = odd(**changes)
    for make in (decode.layer_fns, decode.attend_route_fns, decode.net):
        with pytest.raises(SpecmdError, match=f"qwen2_moe: the decode kernels do not serve this model: .*{reason}"):
            make(cfg)
    assert "latent" in str(decode.serves(moe.tiny("deepseek_v2")))


def test_more_than_one_token_is_refused():
    cfg, params = made("olmoe")
    x = jnp.zeros((1, 2, cfg.width), cfg.np_dtype)
    fns = decode.layer_fns(cfg, interpret=True)[0]
    with pytest.raises(SpecmdError, match=r"expected one token, a row of shape \[1, 1, 64\], got \[1, 2, 64\]"):
        fns.attend(params["layers"][0], x, full_cache(cfg), position(0))
    for call in (lambda: fns.route(params["layers"][0], x[0]), lambda: decode.head_fn(cfg)(params["head"], x[0])):
        with pytest.raises(SpecmdError, match=r"expected one token, a row of shape \[1, 64\], got \[2, 64\]"):
            call()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("positions", [100, 5000])
@pytest.mark.parametrize("name", [name for name in moe.PUBLISHED if decode.serves(moe.published(name)) is None])
def test_a_gpu_could_run_it(name, positions):
    """Lowers to Triton's language, which has no gathers, sorts or slices and wants powers of two."""
    cfg = moe.published(name)
    params, fns = param_spec(cfg), decode.layer_fns(cfg)[0]
    spec, index = jax.ShapeDtypeStruct, jnp.int32(0)
    x, h, start = spec((1, 1, cfg.width), cfg.np_dtype), spec((1, cfg.width), cfg.np_dtype), spec((1,), jnp.int32)
    cache = LayerCache(*(spec((1, positions, cfg.kv_heads, cfg.head_dim), cfg.np_dtype),) * 2)
    stack = jax.tree.map(lambda leaf: spec((2, *leaf.shape), leaf.dtype), (params["layers"][0], cache))
    calls = [
        (fns.attend, params["layers"][0], x, cache, start),
        (decode.attend_route_fns(cfg)[0], params["layers"][0], x, cache, start),
        (lambda params, *rest: fns.attend(decode.At(params, index), *rest), stack[0], x, stack[1], start),
        (decode.head_fn(cfg), params["head"], h),
        *((part, params["layers"][0], h) for part in (fns.route, fns.shared, fns.mlp) if part),
    ]
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        for call, *args in calls:
            assert "gpu.triton" in jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
