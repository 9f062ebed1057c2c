"""The decoder's own laws: experts by slots or resident give the same bits, however the pass is cut up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import quantize_store

from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model import routing
from specmd_jax.moe.model.forward import finish, param_spec
from specmd_jax.moe.model.random_weights import random_experts

KEY = jax.random.key(7)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def made(family, dtype="float32", layers=2):
    dense = {"first_k_dense_replace": layers - 1} if family.startswith("deepseek") else {}
    cfg = moe.tiny(family, dtype, num_hidden_layers=layers, **dense)
    return cfg, moe.random_params(cfg, KEY), moe.random_stacks(cfg, KEY)


def tokens(cfg, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocabulary, shape), jnp.int32)


def zeros(batch):
    return jnp.zeros(batch, jnp.int32)


def random_routing(cfg, count, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(cfg.experts, cfg.top_k, replace=False) for _ in range(count)]).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(rng.random((count, cfg.top_k)), jnp.float32)


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 70])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_experts_are_the_weighted_sum_of_each_on_its_tokens(family, count):
    cfg, _, stacks = made(family, layers=1)
    ids, gates = random_routing(cfg, count)
    ids = ids.at[0, 1].set(-1)  # a dropped choice adds nothing
    h = jax.random.normal(KEY, (count, cfg.width))
    got = jax.jit(lambda h, ids, gates, s: moe_experts.experts(cfg, h, ids, gates, moe.stacked(s)))(
        h, ids, gates, stacks[0]
    )
    expected = np.zeros((count, cfg.width))
    for n, k in np.ndindex(*ids.shape):
        if ids[n, k] >= 0:
            expert = jax.tree.map(lambda leaf, e=int(ids[n, k]): np.asarray(leaf[e], np.float64), stacks[0])
            expected[n] += float(gates[n, k]) * plain_expert(cfg, expert, np.asarray(h[n], np.float64))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def plain_expert(cfg, expert, h):
    hidden = expert.gate_up @ h + (0 if expert.gate_up_bias is None else expert.gate_up_bias)
    gate, up = np.split(hidden, 2)
    if cfg.activation == "clamped_swiglu":
        gate, up = np.minimum(gate, cfg.swiglu_limit), np.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)
        inner = (up + 1) * gate / (1 + np.exp(-cfg.swiglu_alpha * gate))
    else:
        inner = up * gate / (1 + np.exp(-gate))
    return expert.down @ inner + (0 if expert.down_bias is None else expert.down_bias)


@pytest.mark.parametrize("count", [1, 40])
def test_experts_brought_in_by_parts_give_the_same_bits(count):
    cfg, _, stacks = made("olmoe", layers=1)
    ids, _ = random_routing(cfg, count)
    h = jax.random.normal(KEY, (count, cfg.width))
    run = jax.jit(lambda h, s, chosen, out: moe_experts.pair_outputs(cfg, h, ids, moe.stacked(s), chosen, out))
    nothing = jnp.zeros((count, cfg.top_k, cfg.width))
    whole = run(h, stacks[0], jnp.ones(cfg.experts, bool), nothing)
    parts = nothing
    for some in ([6, 1], [0, 2, 3, 7], [4, 5]):
        others = jnp.asarray(sorted({*range(cfg.experts)} - {*some}))
        absent = jax.tree.map(lambda leaf, others=others: leaf.at[others].set(jnp.nan), stacks[0])
        parts = run(h, absent, jnp.zeros(cfg.experts, bool).at[jnp.asarray(some)].set(True), parts)
    np.testing.assert_array_equal(parts, whole)
    assert np.asarray(whole).any()


@pytest.mark.parametrize(("count", "rows"), [(1, 8), (16, 8), (17, 16), (64, 32), (1024, 128)])
def test_block_rows(count, rows):
    assert moe_experts.block_rows(moe.tiny("mixtral"), count, 2) == rows  # 8 experts, 2 a token


# ---- layer by layer --------------------------------------------------------------------------------------------------


def drive(cfg, params, stacks, prompt, steps):
    """Generation as an offloading engine runs it: one jit a function, experts in shuffled slots of a larger buffer."""
    net, batch = moe.build(cfg), prompt.shape[0]
    jitted = {}

    def call(fn, *args):
        return jitted.setdefault(fn, jax.jit(fn))(*args)

    def routed(h, ids, gates, slots, slot_of):
        return net.experts(h, ids, gates, moe.slotted(slots, slot_of))

    def in_slots(leaf, place):
        return jnp.full((cfg.experts + 3, *leaf.shape[1:]), jnp.nan, leaf.dtype).at[place].set(leaf)

    rng, slots, index = np.random.default_rng(5), [], []
    for stack in stacks:
        index.append(jnp.asarray(rng.permutation(cfg.experts + 3)[: cfg.experts], jnp.int32))
        slots.append(jax.tree.map(lambda leaf, place=index[-1]: in_slots(leaf, place), stack))

    cache, out, logits_seen = list(moe.init_cache(cfg, batch, prompt.shape[1] + steps - 1)), [], []
    ids, start = prompt, zeros(batch)
    for _ in range(steps):
        x = call(net.embed, params["embed"], ids)
        for number, layer in enumerate(net.layers):
            here = params["layers"][number]
            x, h, cache[number] = call(layer.attend, here, x, cache[number], start)
            if layer.route is None:
                x = call(finish, x, call(layer.mlp, here, h))
                continue
            chosen, gates, _ = call(layer.route, here, h)
            m = cfg.moe_index(number)
            parts = [call(routed, h, chosen, gates, slots[m], index[m])]
            if layer.shared is not None:
                parts.append(call(layer.shared, here, h))
            x = call(finish, x, *parts)
        logits = call(net.head, params["head"], x[:, -1])
        logits_seen.append(np.asarray(logits))
        out.append(jnp.argmax(logits, -1).astype(jnp.int32))
        start, ids = start + ids.shape[1], out[-1][:, None]
    return np.stack(out, 1), logits_seen


@pytest.mark.parametrize(("family", "dtype"), [slow("qwen2_moe", "float32"), ("deepseek_v2", "bfloat16")])
def test_layer_by_layer_out_of_slots_equals_all_resident_bit_for_bit(family, dtype):
    cfg, params, stacks = made(family, dtype)
    prompt, steps = tokens(cfg, 1, 9), 3
    by_slots, by_slots_logits = drive(cfg, params, stacks, prompt, steps)
    net, cache = moe.build(cfg), moe.init_cache(cfg, 1, 9 + steps - 1)

    @jax.jit
    def whole_pass(params, stacks, ids, cache, start):
        x, cache, _ = moe.forward(net, params, stacks, ids, cache, start)
        return net.head(params["head"], x[:, -1]), cache

    ids, start, greedy = prompt, zeros(1), []
    for step in range(steps):
        logits, cache = whole_pass(params, stacks, ids, cache, start)
        np.testing.assert_array_equal(np.asarray(logits), by_slots_logits[step])
        greedy.append(jnp.argmax(logits, -1).astype(jnp.int32))
        start, ids = start + ids.shape[1], greedy[-1][:, None]
    np.testing.assert_array_equal(np.stack(greedy, 1), by_slots)


# ---- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_oss", slow("deepseek_v2")])
def test_cutting_padding_and_batching_change_nothing(family):
    cfg, params, stacks = made(family, layers=1)
    net, ids = moe.build(cfg), tokens(cfg, 2, 24)
    jitted = jax.jit(functools.partial(moe.forward, net))
    run = functools.partial(jitted, params, stacks)
    whole, _, routed = run(ids, moe.init_cache(cfg, 2, 40), zeros(2))

    # one sequence alone, in three chunks, the last padded to the right with other tokens
    cache, seen, chosen = moe.init_cache(cfg, 1, 40), [], []
    for start, size in ((0, 10), (10, 10), (20, 4)):
        chunk = jnp.concatenate([ids[1:, start : start + size], tokens(cfg, 1, 10 - size, seed=9)], axis=1)
        x, cache, part = run(chunk, cache, zeros(1) + start, jnp.full(1, size, jnp.int32))
        seen.append(x[:, :size])
        chosen.append(part.ids[:, :, :size])
        assert (np.asarray(part.ids[:, :, size:]) == -1).all() and not np.asarray(part.gates[:, :, size:]).any()
    np.testing.assert_allclose(jnp.concatenate(seen, 1)[0], whole[1], atol=1e-4)
    np.testing.assert_array_equal(np.concatenate(chosen, 2)[:, 0], routed.ids[:, 1])

    # decode of two sequences that have reached different positions
    ragged = moe.init_cache(cfg, 2, 40)
    lengths = jnp.asarray([15, 23], jnp.int32)
    x, ragged, _ = run(ids, ragged, zeros(2), lengths)
    np.testing.assert_allclose(jnp.stack([x[0, 14], x[1, 22]]), jnp.stack([whole[0, 14], whole[1, 22]]), atol=1e-4)
    x, _, _ = run(jnp.take_along_axis(ids, lengths[:, None], axis=1), ragged, lengths)
    np.testing.assert_allclose(x[:, 0], jnp.stack([whole[0, 15], whole[1, 23]]), atol=1e-4)


def test_generate_records_the_routing_of_every_fed_token():
    cfg, params, stacks = made("deepseek_v2")  # one of its two layers has routed experts
    prompt = tokens(cfg, 2, 7)
    made_ = moe.generate(cfg, params, stacks, prompt, 4)
    assert made_.tokens.shape == (2, 4) and made_.tokens.dtype == np.int32
    assert made_.prefill.ids.shape == (len(cfg.moe_layers), 2, 7, cfg.top_k)
    assert made_.decode.logits.shape == (3, len(cfg.moe_layers), 2, 1, cfg.experts)
    again = jnp.concatenate([prompt, jnp.asarray(made_.tokens[:, :-1])], axis=1)
    run = jax.jit(functools.partial(moe.forward, moe.build(cfg)))
    _, _, routed = run(params, stacks, again, moe.init_cache(cfg, 2, 10), zeros(2))
    np.testing.assert_array_equal(routed.ids[:, :, :7], made_.prefill.ids)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(routed.ids[:, :, 7:]), 2, 0)[:, :, :, None], made_.decode.ids)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_lower_precisions_run_in_the_same_code(precision):
    cfg, _, stacks = made("olmoe", layers=1)
    store = quantize_store(jax.device_get(stacks), precision)
    ids, gates = random_routing(cfg, 12)
    h = jax.random.normal(KEY, (12, cfg.width))
    run = jax.jit(lambda h, ids, gates, s: moe_experts.experts(cfg, h, ids, gates, moe.stacked(s)))
    exact, near = (run(h, ids, gates, s) for s in (stacks[0], store[0]))
    error = float(jnp.linalg.norm(near - exact) / jnp.linalg.norm(exact))
    assert 0 < error < {"int8": 0.02, "int4": 0.2}[precision]
    one = run(h[3:4], ids[3:4], gates[3:4], store[0])  # one token runs matrix-vector products instead of blocks
    np.testing.assert_allclose(one[0], near[3], atol=1e-5)


def test_layers_of_one_kind_share_their_functions():
    assert len(set(moe.build(moe.tiny("olmoe")).layers)) == 1
    assert len(set(moe.build(moe.tiny("gpt_oss")).layers)) == 2  # with and without a window
    assert len(set(moe.build(moe.tiny("qwen2_moe")).layers)) == 2  # routed and dense


# ---- routers ---------------------------------------------------------------------------------------------------------


def test_experts_that_somebody_else_chose_weigh_by_the_routers_own_rule():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]])
    probs = np.exp(logits[0]) / np.exp(logits[0]).sum()
    for family, gates in (
        ("qwen2_moe", [probs[4], probs[0]]),
        ("mixtral", np.asarray([probs[4], probs[0]]) / (probs[4] + probs[0])),
        ("gpt_oss", np.asarray([probs[4], probs[0]]) / (probs[4] + probs[0])),
    ):
        cfg = dataclasses.replace(moe.tiny(family), top_k=2)
        np.testing.assert_allclose(routing.weigh(cfg, logits, jnp.array([[4, 0]]))[0], gates, rtol=1e-6)
        ids, own = routing.ROUTERS[cfg.router](cfg, logits)
        assert ids.tolist() == [[0, 1]]
        np.testing.assert_array_equal(routing.weigh(cfg, logits, ids), own)
    for family in ("phimoe", "deepseek_v2"):
        cfg = moe.tiny(family)
        with pytest.raises(SpecmdError, match=f"its router '{cfg.router}' does not choose the K largest logits"):
            routing.weigh(cfg, logits, jnp.array([[4, 0]]))


def test_grouped_router_stays_within_the_best_groups():
    cfg = moe.tiny("deepseek_v2")  # 8 experts in 4 groups, 2 groups kept, 3 experts a token
    logits = jnp.asarray([[5.0, -9.0, 4.0, -8.0, 3.9, 3.8, 3.7, 3.6]])
    ids, gates = routing.grouped(cfg, logits)
    assert ids.tolist() == [[0, 2, 3]]  # the fourth-best expert has no group of its own rank
    np.testing.assert_allclose(gates[0], 4.0 * jax.nn.softmax(logits[0])[ids[0]], rtol=1e-6)


def test_ties_go_to_the_lower_expert():
    for family in ("olmoe", "gpt_oss", "phimoe"):
        cfg = moe.tiny(family)
        ids, _ = routing.ROUTERS[cfg.router](cfg, jnp.zeros((1, 8)))
        assert ids[0].tolist() == list(range(cfg.top_k))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "steps", "length", "message"),
    [
        ([[1, 96]], 2, 0, r"sequence 0, token 1: id 96 is outside the vocabulary 0\.\.95"),
        ([[]], 2, 0, "expected token ids of shape"),
        ([[0.5]], 2, 0, "expected token ids of shape"),
        ([[1, 2]], 0, 0, "expected at least 1 token"),
        ([[1, 2]], 4, 4, "prompt of 2 and 4 new tokens need 5 positions, there are 4"),
        ([[1, 2]], 300, 0, "need 301 positions, there are 256"),
    ],
)
def test_generate_refuses_bad_prompts(prompt, steps, length, message):
    cfg = moe.tiny("olmoe")
    with pytest.raises(SpecmdError, match=message) as caught:
        moe.generate(cfg, {}, (), prompt, steps, length)
    assert "\n" not in str(caught.value)


def test_generate_names_the_first_token_without_finite_logits():
    cfg, params, stacks = made("olmoe", layers=1)
    broken = stacks[0]._replace(down=stacks[0].down * jnp.nan)
    with pytest.raises(SpecmdError, match="logits of generated token 0 of sequence 0 are not finite"):
        moe.generate(cfg, params, (broken, *stacks[1:]), tokens(cfg, 1, 3), 2)


def test_random_weights_are_reproducible_and_have_the_specified_shapes():
    cfg, params, stacks = made("phimoe")
    spec = param_spec(cfg)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda s: (s.shape, s.dtype), spec)
    one = moe_experts.expert_spec(cfg)
    for stack in stacks:
        assert jax.tree.map(lambda a: a.shape[1:], stack) == jax.tree.map(lambda s: s.shape, one)
    again = random_experts(cfg, KEY, 1)
    jax.tree.map(np.testing.assert_array_equal, again, stacks[1])
    assert not np.array_equal(stacks[0].down, stacks[1].down)
