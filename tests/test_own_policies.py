"""A policy that the package has never heard of is as good as a row of a table, on every axis and in every engine."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import LINK, small_trace

from specmd_jax import explain, prepare, run, sweep, totals
from specmd_jax.engines.scan import replay_many
from specmd_jax.engines.table import ENGINES
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import EVICTION, MISS, PREFETCH
from specmd_jax.policies.base import Curve, Eviction, Gate, Miss, Plan, Prefetch, Row, Size
from specmd_jax.policies.columns import COUNT, TOUCH, scored
from specmd_jax.policies.eviction import lfu_decay
from specmd_jax.setting import Setting

TRACE = small_trace(3)
BIG = 20 * int(TRACE.expert_bytes.max())


def thrifty(bonus: float = 2.0) -> Eviction:
    """Recency, with `bonus` visits of credit for each use: nothing that the tables have."""

    def keep(now: Any, layer: jax.Array, touch: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
        return (touch.astype(jnp.float32) + jnp.float32(bonus) * count.astype(jnp.float32), touch)

    return scored(keep, touch=TOUCH, count=COUNT)


def recency_again() -> Eviction:
    """`lru`, written down once more, with what the curves need to know."""
    return scored(lambda now, layer, touch: (touch,), curve=Curve("touch"), touch=TOUCH)


def stubborn(first: int = 3) -> Prefetch:
    """Wants the `first` experts of every layer, whatever happens."""

    def want(state: Any, gate: Gate, size: Size) -> jax.Array:
        ids = jnp.arange(size.experts)
        row = jnp.where(ids < first, 1.0 + ids.astype(jnp.float32), -jnp.inf)
        return jnp.broadcast_to(row, (size.horizon, size.experts))

    return Prefetch(lambda size: (), lambda state, gate: state, want)


def drop_the_last(share: float = 0.5) -> Miss:
    """Skips missing experts of the less important `share` of the demand."""

    def plan(row: Row) -> Plan:
        demanded = jnp.sum(row.demand).astype(jnp.float32)
        skipped = row.order.astype(jnp.float32) >= (1.0 - jnp.float32(share)) * demanded
        nobody = jnp.full(row.demand.shape, -1, jnp.int32)
        level = jnp.full(row.demand.shape, row.levels, jnp.int32)
        return Plan(level, jnp.where(skipped, 0, level), jnp.zeros(row.demand.shape, bool), nobody)

    return Miss(plan)


def alike(found: Any, wanted: Any) -> bool:
    return found == (wanted if wanted is None else pytest.approx(wanted, rel=1e-6))


def same(one: Any, other: Any) -> None:
    rows = [{k: v for k, v in found.row().items() if v is not None} for found in (one, other)]
    assert rows[0] == pytest.approx(rows[1], rel=2e-5)


def test_every_engine_replays_an_eviction_policy_of_ones_own() -> None:
    cell = Setting(eviction=recency_again, capacity=BIG, hardware=None)
    assert explain(TRACE, cell).engine == "curves"
    named = run(TRACE, eviction="lru", capacity=BIG, hardware=None)
    for engine in ENGINES:
        assert run(TRACE, cell, engine=engine) == named, engine
    ahead = Setting(eviction=thrifty, capacity=BIG, hardware=LINK, prefetch=stubborn)
    ours = [run(TRACE, ahead, engine=engine) for engine in ("gpu", "scan")]
    same(*ours)
    assert ours[0].hits != run(TRACE, eviction="lru", capacity=BIG, hardware=LINK, prefetch=stubborn).hits
    with pytest.raises(SpecmdError, match="engine 'curves' does not serve this: eviction 'thrifty' declares no Curve"):
        run(TRACE, eviction=thrifty, capacity=BIG, hardware=None, engine="curves")


def test_a_predictor_and_a_rule_of_ones_own() -> None:
    ahead = run(TRACE, prefetch=stubborn, first=2, capacity=BIG, hardware=LINK)
    assert ahead.bytes_prefetch_used + ahead.bytes_prefetch_wasted > 0
    assert ahead != run(TRACE, prefetch=partial(stubborn, first=1), capacity=BIG, hardware=LINK)
    lossy = run(TRACE, miss=drop_the_last, capacity=BIG, hardware=LINK)
    assert lossy.dropped > 0 and lossy.dropped + lossy.loads == lossy.misses
    assert explain(TRACE, miss=drop_the_last).refusals["gpu"] == "miss 'drop_the_last': it fetches every miss"


def test_the_same_policy_in_every_form() -> None:
    """A name with a number, a partial, JAX's partial, a built one and one that is built again."""
    forms: list[dict[str, Any]] = [
        {"eviction": "lfu_decay", "decay": 0.7},
        {"eviction": "LFU_decay", "numbers": {"decay": 0.7}},
        {"eviction": lfu_decay, "decay": 0.7},
        {"eviction": partial(lfu_decay, decay=0.7)},
        {"eviction": jax.tree_util.Partial(lfu_decay, decay=0.7)},
        {"eviction": partial(lfu_decay, 0.7)},
        {"eviction": lfu_decay(0.7)},
    ]
    for hardware in (None, LINK):
        first, *rest = [run(TRACE, capacity=BIG, hardware=hardware, prefetch="previous", **form) for form in forms]
        assert all(other == first for other in rest)


def test_a_number_is_traced_in_every_form_that_shows_it() -> None:
    prepared = prepare(TRACE)
    decays = jnp.array([0.3, 0.9, 0.99])

    def misses(**cell: Any) -> jax.Array:
        return totals(prepared, capacity=BIG, hardware=None, **cell).experts.fetched.sum()

    by_name = jax.vmap(lambda decay: misses(eviction="lfu_decay", decay=decay))(decays)
    by_partial = jax.vmap(lambda decay: misses(eviction=partial(lfu_decay, decay=decay)))(decays)
    built = jax.vmap(lambda decay: misses(eviction=lfu_decay(decay)))(decays)
    alone = [misses(eviction="lfu_decay", decay=float(decay)) for decay in decays]
    for found in (by_name, by_partial, built):
        np.testing.assert_array_equal(found, alone)
    assert len({int(m) for m in alone}) > 1

    def seconds(rate: jax.Array) -> jax.Array:
        return totals(prepared, capacity=BIG, hardware=LINK.replace(link_bytes_per_s=rate)).seconds.sum()

    slow, fast = jax.vmap(seconds)(jnp.array([1e9, 9e9]))
    assert slow > fast


def test_two_numbers_share_a_program() -> None:
    program: Any = replay_many
    run(TRACE, eviction=partial(lfu_decay, decay=0.5), prefetch=stubborn, first=2, capacity=BIG)
    before = program._cache_size()
    run(TRACE, eviction="lfu_decay", decay=0.9, prefetch=stubborn, first=1, capacity=BIG // 2)
    assert program._cache_size() == before


def test_a_sweep_over_five_axes_at_once() -> None:
    """Each cell is what it is alone, whatever it shares a launch with."""
    machines = [LINK, LINK.replace(link_bytes_per_s=9e9)]
    rows = list(
        sweep(
            TRACE,
            eviction=["lru", thrifty],
            prefetch=["none", stubborn],
            capacity=["25%", "60%"],
            hardware=machines,
            bonus=[0.5, 4.0],
            first=2,
        )
    )
    assert len(rows) == (1 + 2) * 2 * 2 * 2
    functions = {"thrifty": thrifty, "stubborn": stubborn}
    keys = ("eviction", "prefetch", "capacity_pct", "bonus", "first")
    found = {tuple(row.get(name) for name in keys) for row in rows}
    assert len(found) == len(rows) // 2  # the two machines share a name
    for row in rows[::5]:  # every value of every axis is among them
        cell = {axis: functions.get(row[axis], row[axis]) for axis in ("eviction", "prefetch")}
        numbers = {name: row[name] for name in ("bonus", "first") if name in row}
        others = [run(TRACE, hardware=m, capacity=f"{row['capacity_pct']:g}%", **cell, **numbers) for m in machines]
        assert any(all(alike(row[name], value) for name, value in other.row().items()) for other in others)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eviction": lambda: 3}, "eviction 'lambda' returns int, expected an Eviction"),
        ({"eviction": lambda row: row}, "eviction 'lambda' needs 'row'"),
        ({"eviction": PREFETCH["previous"]}, "eviction 'previous' returns Prefetch, expected an Eviction"),
        ({"eviction": EVICTION["lru"](), "decay": 0.5}, "unknown policy number 'decay'"),
        ({"prefetch": MISS["fetch"]()}, "prefetch is Miss("),
        ({"miss": None}, "miss is None, expected a miss policy"),
        ({"eviction": 7}, "eviction is 7, expected an eviction policy"),
        ({"eviction": thrifty, "bonus": "much"}, "bonus"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_policy_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        run(TRACE, capacity=BIG, hardware=None, **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
