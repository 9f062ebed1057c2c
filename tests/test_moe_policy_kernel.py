"""The policy as one kernel decides what the simulator's step does, and both makers hand slots out soundly."""

# pyright: reportArgumentType=false
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
from specmd_jax.moe.fused import placing
from specmd_jax.moe.kernels import policy as kernel
from specmd_jax.moe.kernels.placed import Token, decisions, make_frame
from specmd_jax.moe.runtime.decider import GateOutput, Seen, columns
from specmd_jax.moe.runtime.policy import make_policy, numbers_of
from specmd_jax.policies import EVICTION
from specmd_jax.policies.base import Eviction
from specmd_jax.policies.columns import TOUCH, scored
from specmd_jax.policies.eviction import lru

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 12, 3, 5
PASSES = (TOKENS, *[1] * 8, TOKENS, *[1] * 12)


def shy() -> Eviction:
    """Most recently used leaves first, the demand included."""
    return scored(lambda now, layer, touch: (-touch,), touch=TOUCH)._replace(bypass=True)


def config(layers: int = LAYERS, experts: int = EXPERTS) -> Any:
    whole = moe.tiny("olmoe", "float32")
    return dataclasses.replace(
        whole, layers=layers, windows=(0,) * layers, moe_layers=tuple(range(layers)), experts=experts, top_k=TOP_K
    )


def served(name: str) -> bool:
    policy = EVICTION[name]()
    return policy.rows is not None and not policy.oracle


SERVED = [name for name in EVICTION if served(name)]


def gates(seed: int, layers: int, experts: int, passes: tuple[int, ...]) -> list[list[GateOutput]]:
    """Routing with favourites that change slowly: [pass][layer]."""
    rng, made = np.random.default_rng(seed), []
    taste = rng.normal(size=(layers, experts)) * 1.5
    for tokens in passes:
        taste += rng.normal(size=taste.shape)
        noise = rng.gumbel(size=(layers, tokens, experts))
        ids = np.argsort(-(taste[:, None] + noise), axis=-1)[..., :TOP_K].astype(np.int32)
        shares = -np.sort(-rng.dirichlet(np.ones(TOP_K), (layers, tokens)), axis=-1).astype(np.float32)
        ahead = rng.dirichlet(np.full(experts, 0.3), (layers, tokens)).astype(np.float32)
        made.append([GateOutput(*rows) for rows in zip(ids, shares, ahead, strict=True)])
    return made


def visit_of(index: int, layer: int, pass_id: int, gate: GateOutput, experts: int) -> Token | Seen:
    now = {"index": jnp.int32(index), "layer": jnp.int32(layer), "pass_id": jnp.int32(pass_id)}
    assert gate.ahead is not None
    if len(gate.ids) == 1:
        return Token(**now, ids=jnp.asarray(gate.ids[0]), gates=jnp.asarray(gate.gates[0]), ahead=gate.ahead[0])
    whole, real = columns(gate, experts)
    count, rank = whole[5 : 5 + experts], whole[5 + experts :]
    tokens = jnp.int32(len(gate.ids))
    return Seen(
        **now, tokens=tokens, decode=jnp.int32(0), count=jnp.asarray(count), mass=jnp.asarray(real[:experts]),
        rank=jnp.asarray(rank), ahead=jnp.asarray(real[experts:]),
    )  # fmt: skip


class Device:
    """What the slots hold when an engine does as it is told."""

    def __init__(self, capacity: int, staging: int, layers: int, experts: int) -> None:
        self.capacity, self.staging, self.experts = capacity, staging, experts
        self.content = np.full(capacity + staging, -1)
        self.where: dict[int, int] = {}
        self.level = np.zeros((layers, experts), np.int8)

    def put(self, flat: int, slot: int) -> None:
        assert 0 <= slot < self.content.size
        self.content[slot], self.where[flat] = flat, slot

    def visit(self, layer: int, demanded: Any, one_token: bool, placed: Any, decision: Any) -> None:
        slots, own = placed.slot, layer * self.experts
        here = self.level[layer] > 0
        stays, after = decision.level[layer] > 0, decision.level > 0
        np.testing.assert_array_equal(placed.missing, demanded & ~here)
        spare = placed.spare[placed.spare >= 0]
        both = after.copy()
        both[layer] |= demanded
        in_use = both.sum() if one_token else after.sum()
        assert in_use <= self.capacity + (self.staging if one_token else 0)
        assert spare.size == min(self.staging, self.content.size - in_use)
        assert np.unique(spare).size == spare.size
        self.content[spare] = -2  # an engine may do with them what it likes, at once
        for expert in np.flatnonzero(demanded & here):
            assert self.content[slots[expert]] == own + expert
        assert (slots[~demanded] == -1).all()
        passes_through = demanded & ~here & ~stays & (not one_token)
        np.testing.assert_array_equal(slots == -1, ~demanded | passes_through)
        for expert in np.flatnonzero(demanded & ~here & (slots >= 0)):
            self.put(own + expert, slots[expert])
        coming, targets = placed.coming[placed.coming >= 0], placed.coming_slot[placed.coming_slot >= 0]
        assert (placed.coming[coming.size :] == -1).all() and targets.size == coming.size
        if one_token:
            for expert in np.flatnonzero(demanded):
                assert self.content[slots[expert]] == own + expert
            assert not np.isin(targets, slots[demanded]).any()
        for flat, slot in zip(coming, targets, strict=True):
            self.put(flat, slot)
        order = {int(number): ((layer + 1 + a) % len(after)) * self.experts + e
                 for (a, e), number in np.ndenumerate(decision.prefetched) if number}  # fmt: skip
        assert [order[n + 1] for n in range(len(order))] == coming.tolist()
        for flat in np.flatnonzero(after):
            assert self.content[self.where[flat]] == flat
        self.level = decision.level


def run(maker: Any, policy: Any, layers: int, experts: int, routing: list[list[GateOutput]], **options: Any) -> Any:
    """Gives [visit] what was placed, and logs or decisions, in numpy."""
    frame, numbers, mix = make_frame(policy, TOP_K), jax.device_put(numbers_of(policy)), policy.mix.traced()
    step = jax.jit(functools.partial(maker.visit, frame, **options))
    state, index, found = maker.begin(frame, numbers, mix), 0, []
    for pass_id, row in enumerate(routing):
        for layer, gate in enumerate(row):
            state, placed, told = step(numbers, mix, state, visit_of(index, layer, pass_id, gate, experts))
            found.append((jax.tree.map(np.asarray, placed), jax.tree.map(np.asarray, told)))
            index += 1
    return frame, found


def check(
    eviction: Any, seed: int = 0, layers: int = LAYERS, experts: int = EXPERTS, passes: Any = PASSES, **changes: Any
) -> Any:
    policy = make_policy(config(layers, experts), 1000, eviction=eviction, **changes)
    assert kernel.serves(policy) is None
    routing = gates(seed, layers, experts, passes)
    frame, wanted = run(placing, policy, layers, experts, routing)
    _, found = run(kernel, policy, layers, experts, routing, interpret=True)
    logs = [log for _, log in found]
    by_pass = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *logs[start : start + layers])
        for start in range(0, len(logs), layers)
    ]
    told = decisions(frame.setup, by_pass)
    for number, (one, (_, other)) in enumerate(zip(told, wanted, strict=True)):
        for name in other._fields:
            a, b = getattr(one, name), getattr(other, name)
            np.testing.assert_array_equal(a, b, f"visit {number}: {name}")
            assert a.dtype == b.dtype, name
    for placed in (found, wanted):
        device, number = Device(frame.capacity, frame.staging, layers, experts), 0
        for row in routing:
            for layer, gate in enumerate(row):
                demanded = np.isin(np.arange(experts), gate.ids)
                device.visit(layer, demanded, len(gate.ids) == 1, placed[number][0], told[number])
                number += 1
    return told


CASES: list[dict[str, Any]] = [
    {"capacity": "1 slots"},
    {"capacity": "4 slots", "prefetch": "gate_ahead"},
    {"capacity": "25%", "prefetch": "transition", "horizon": 2},
    {"capacity": "50%", "prefetch": "gate_ahead", "may_evict": False},
    {"capacity": "40%", "scope": "layer"},
    {"capacity": "60%", "scope": "layer", "prefetch": "online", "horizon": 2, "may_evict": False},
    {"capacity": "35%", "scope": "layer", "prefetch": "gate_ahead"},
    {"capacity": "100%", "prefetch": "gate_ahead"},
    {"capacity": "70%"},
    {"capacity": "15%", "prefetch": "previous", "overfetch": 2.0},
    {"capacity": "15%", "prefetch": "previous", "selection": "percentile", "percentile": 50.0},
]
FAST = (2, 6)  # of the settings
QUICK = ("weighted",)  # of the policies


def marked(values: list[Any], fast: Any) -> list[Any]:
    """Those that are not fast are slow."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("number", marked(list(range(len(CASES))), FAST))
def test_every_setting(number: int) -> None:
    case = CASES[number]
    found = check("least_stale", seed=number, **case)
    assert (sum(d.evictions.sum() for d in found) > 0) == (case["capacity"] != "100%")
    assert any(d.prefetched.any() for d in found) == ("prefetch" in case)
    if case["capacity"] in ("4 slots", "25%"):
        assert any(d.collision.any() for d in found)


@pytest.mark.parametrize("eviction", marked(SERVED, QUICK))
def test_every_policy(eviction: str) -> None:
    """Each with another setting."""
    check(eviction, seed=1, **CASES[SERVED.index(eviction) % len(CASES)])


OTHERS: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"eviction": shy, "capacity": "20%"}, {}),
    ({"eviction": shy, "capacity": "50%", "prefetch": "gate_ahead"}, {}),
    ({"eviction": "lru", "capacity": "50%", "prefetch": "previous"}, {"layers": 1, "experts": 8}),
    ({"eviction": "lfu_decay", "capacity": "30%", "numbers": {"decay": 0.5}}, {"experts": 16}),
    ({"eviction": "lru", "capacity": "30%", "prefetch": "popular", "horizon": 4}, {"layers": 5}),
]


@pytest.mark.parametrize("number", marked(list(range(len(OTHERS))), (0,)))
def test_other_policies_and_shapes(number: int) -> None:
    """The demand competes for its place, too; a layer ahead of itself; powers of two."""
    changes, shape = OTHERS[number]
    found = check(seed=2, **changes, **shape)
    assert sum(d.evictions.sum() for d in found) > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eviction": "slru"}, "'slru' does not change one layer at a time"),
        ({"eviction": lru()}, "built already"),
        ({"miss": "drop"}, "miss 'drop': it fetches every miss"),
        ({"prefetch": "previous", "horizon": 9}, "horizon 9, it looks up to 8"),
    ],
    ids=["slru", "built", "drop", "horizon"],
)
def test_what_it_does_not_serve_is_said(changes: dict[str, Any], reason: str) -> None:
    told = kernel.serves(make_policy(config(layers=10), 1000, capacity="50%", **changes))
    assert told is not None and reason in told


def test_several_precisions_are_refused() -> None:
    policy = make_policy(config(), (500, 1000), capacity="50%", miss="fetch_lowest_bit")
    assert kernel.serves(policy) == "it has one stored precision, this has 2"


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("eviction", SERVED)
def test_a_gpu_could_run_it(eviction: str, tokens: int) -> None:
    """Lowers to Triton's language, which has no gathers, sorts or slices and wants powers of two."""
    policy = make_policy(config(), 1000, eviction=eviction, capacity="50%", prefetch="transition", horizon=2)
    frame, numbers, mix = make_frame(policy, TOP_K), numbers_of(policy), policy.mix.traced()
    seen = visit_of(0, 0, 0, gates(0, LAYERS, EXPERTS, (tokens,))[0][0], EXPERTS)
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        traced = jax.jit(functools.partial(kernel.visit, frame)).trace(
            numbers, mix, kernel.begin(frame, numbers, mix), seen
        )
        assert "policy" in traced.lower(lowering_platforms=("cuda",)).as_text()
