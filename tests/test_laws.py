"""Laws that every eviction policy keeps, and what one compiled program may be asked for.

Each policy is compiled once: one program replays every trace here at 200 budgets, and other budgets and numbers after.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import LINK, engine, small_trace

from specmd_jax.engines import prepared as plan
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.policies import EVICTION
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.metrics import metrics_of
from specmd_jax.replay.totals import FETCHED, Events, Totals
from specmd_jax.schedule.counted import counted_of
from specmd_jax.types import NEVER

BYTES = 40960
BUDGETS = 200
NUMBERS: dict[str, list[Mapping[str, Any]]] = {
    "random": [{"seed": 1}, {"seed": 2}],
    "lfu_decay": [{"decay": 0.5}, {"decay": 0.99}],
    "slru": [{"protected": 0.1}, {"protected": 0.9}],
}
UNEQUAL = prepare(small_trace(11))
EQUAL = prepare(small_trace(11, expert_bytes=BYTES))  # the same routing, so the same program
DECODE = prepare(small_trace(12, tokens=20, prompt_tokens=0, expert_bytes=BYTES))


class Grid(NamedTuple):
    """A replay at several budgets: leaves with a leading budget axis, padding cut off."""

    budgets: np.ndarray  # [B] bytes
    totals: Totals
    events: Events

    @property
    def misses(self) -> np.ndarray:
        """[B]"""
        return np.asarray(self.events.outcome == FETCHED).sum(axis=(1, 2))


def programs() -> int:
    """How many have been compiled."""
    compiled: Any = replay_many
    return compiled._cache_size()


def everything(replays: Prepared) -> int:
    return int(replays.sizes.level_bytes[-1].sum()) * replays.schedule.experts


def mix(eviction: str, which: int = 0) -> Mix:
    return Mix.of(eviction, numbers={"eviction": NUMBERS[eviction][which]} if eviction in NUMBERS else None)


def grid(replays: Prepared, mix: Mix, budgets: np.ndarray) -> Grid:
    setup = replays.setup(mix, None, detail="full")
    units = np.stack([replays.sizes.budget(int(b)) for b in budgets])
    numbers = replays.numbers(int(budgets[0]), None)._replace(budget=jnp.asarray(units))
    visits = replays.visits(setup, mix)
    wide = np.full((visits.index.shape[0], replays.schedule.experts), -1, np.int32)  # one shape for every trace
    wide[:, : visits.by_mass.shape[1]] = visits.by_mass
    visits = visits._replace(by_mass=jnp.asarray(wide))
    (_, totals), events = replay_many(setup, ("budget",), numbers, mix.traced(), visits)
    assert events is not None
    cut = jax.tree.map(lambda x: np.asarray(x)[:, : replays.schedule.visits], events)
    return Grid(budgets, jax.tree.map(np.asarray, totals), cut)


def capacities(replays: Prepared) -> np.ndarray:
    """[B] bytes, from one expert to all of them."""
    return np.linspace(int(replays.sizes.level_bytes.max()), everything(replays), BUDGETS).astype(np.int64)


@functools.cache
def results(eviction: str) -> tuple[Grid, Grid]:
    """The unequal and the equal sizes."""
    return grid(UNEQUAL, mix(eviction), capacities(UNEQUAL)), grid(EQUAL, mix(eviction), capacities(EQUAL))


@pytest.mark.parametrize("eviction", EVICTION)
def test_demand_is_hits_and_misses(eviction: str) -> None:
    for replays, found in zip((UNEQUAL, EQUAL), results(eviction), strict=True):
        demanded = replays.schedule.count > 0
        counted, level_bytes = counted_of(replays.schedule), replays.sizes.level_bytes
        np.testing.assert_array_equal(found.events.outcome > 0, np.broadcast_to(demanded, found.events.outcome.shape))
        for b in range(0, BUDGETS, 20):
            totals = jax.tree.map(lambda x, b=b: x[b], found.totals)
            cell = metrics_of(counted, level_bytes, totals, (16.0,), timed=False)
            assert cell.hits + cell.misses == cell.demand == demanded.sum()
            assert cell.misses == found.misses[b] == cell.loads
            assert cell.collisions <= cell.misses


@pytest.mark.parametrize("eviction", EVICTION)
def test_loads_less_evictions_are_resident_and_within_the_budget(eviction: str) -> None:
    for replays, found in zip((UNEQUAL, EQUAL), results(eviction), strict=True):
        assert found.events.level is not None
        resident = found.events.level > 0  # [B, V, L, E]
        loads = np.cumsum((found.events.outcome == FETCHED).sum(axis=2), axis=1)
        left = np.cumsum(found.events.evictions.sum(axis=2), axis=1)
        np.testing.assert_array_equal(loads - left, resident.sum(axis=(2, 3)))
        held = (resident * replays.sizes.level_bytes[-1][:, None]).sum(axis=(2, 3))
        assert (held <= found.budgets[:, None]).all()


@pytest.mark.parametrize("eviction", EVICTION)
def test_room_for_everything_leaves_compulsory_misses(eviction: str) -> None:
    for replays, found in zip((UNEQUAL, EQUAL), results(eviction), strict=True):
        ever = (replays.first_use < NEVER).sum()
        assert found.misses[-1] == ever
        assert found.events.evictions[-1].sum() == 0
        assert not found.events.collision[-1].any()


@pytest.mark.parametrize("eviction", EVICTION)
def test_nobody_beats_the_bound(eviction: str) -> None:
    assert (results(eviction)[1].misses >= results("belady_bypass")[1].misses).all()


@pytest.mark.parametrize("eviction", EVICTION)
def test_one_program_serves_every_size_capacity_and_number(eviction: str) -> None:
    grid(UNEQUAL, mix(eviction), capacities(UNEQUAL))  # compiles it, if it has been let go of since
    before = programs()
    assert before > 0
    found = grid(EQUAL, mix(eviction), capacities(EQUAL))
    other = grid(EQUAL, mix(eviction, -1), capacities(EQUAL) if eviction in NUMBERS else capacities(EQUAL)[::-1])
    assert programs() == before
    assert (found.events.outcome != other.events.outcome).any()  # and they matter


def test_least_stale_by_recency_is_lru_without_prefetch() -> None:
    for lru, stale in zip(results("lru"), results("least_stale_recency"), strict=True):
        np.testing.assert_array_equal(lru.events.outcome, stale.events.outcome)
        np.testing.assert_array_equal(lru.events.level, stale.events.level)
        np.testing.assert_array_equal(lru.events.evictions, stale.events.evictions)


@functools.cache
def decode(eviction: str) -> Grid:
    return grid(DECODE, mix(eviction), capacities(DECODE))


def test_lru_never_loses_from_more_room() -> None:
    assert (np.diff(decode("lru").misses) <= 0).all()


def test_lru_cannot_hit_before_a_cycle_comes_round() -> None:
    """A visit finds what was touched last, and the other layers come before its own: L - 1 visits of K experts each.

    So the last visit's worth of a token cycle already gives hits, when demand is judged a visit at a time.
    """
    found = decode("lru")
    hits = (DECODE.schedule.count > 0).sum() - found.misses
    slots = found.budgets // BYTES
    between = (DECODE.schedule.layers - 1) * DECODE.trace.top_k
    assert (slots <= between).sum() > 30
    assert (hits[slots <= between] == 0).all()
    assert (hits[slots > between] > 0).all()


@pytest.mark.parametrize("eviction", ["lru", "least_stale"])
def test_a_cell_of_a_sweep_is_the_cell_alone(eviction: str) -> None:
    together = decode(eviction)
    for b in range(0, BUDGETS, 4):
        totals, events, _ = engine(DECODE, mix(eviction), int(together.budgets[b]), None)
        jax.tree.map(np.testing.assert_array_equal, events, jax.tree.map(lambda x, b=b: x[b], together.events))
        jax.tree.map(np.testing.assert_array_equal, totals, jax.tree.map(lambda x, b=b: x[b], together.totals))


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Mix.of("least_stale", "previous", numbers={"selection": {"count": 2.0}})
    totals, events, visits = engine(EQUAL, ahead, 12 * BYTES, LINK)
    columns = Prepared.visits
    monkeypatch.setattr(Prepared, "visits", lambda self, *rest: plan.padded(columns(self, *rest), 77))
    more_totals, more_events, _ = engine(EQUAL, ahead, 12 * BYTES, LINK)
    assert visits.index.shape[0] == EQUAL.schedule.visits
    jax.tree.map(np.testing.assert_array_equal, totals, more_totals)
    jax.tree.map(np.testing.assert_array_equal, events, more_events)
