"""Columns that every configuration of a grid reads at each visit: the schedule's, and predictions made once for all.

With the recorded routing no predictor depends on what is resident, and neither do the scores of a trained evictor. So
they need not be worked out in every configuration: they are a column like any other.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.engines.offline_scores import STRETCH, Scores, on_host
from specmd_jax.engines.prepared import Prepared
from specmd_jax.loops import next_power_of_two
from specmd_jax.policies.base import Gate, Now, Size, renew
from specmd_jax.policies.choice import Choice, Mix
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.prefetching import foresee, gather, targets_of
from specmd_jax.replay.state import Open, Setup, Visit
from specmd_jax.schedule.demand import cut


class Columns(NamedTuple):
    """V visits; widths are powers of two: E ids of a layer, M demanded ones, W wishes. All int32 unless noted."""

    count: Any  # [1] visits that are any
    index: Any  # [V], as the next twelve: see `types.Schedule`
    layer: Any
    pass_id: Any
    tokens: Any
    decode: Any
    starts_pass: Any
    ends_layer: Any
    reset: Any
    counted: Any
    clock: Any  # demanded experts so far, plus visits
    demanded: Any  # demanded experts
    touch: Any  # [V, E] access clock of its use (-1: not demanded)
    mass: Any  # [V, E] float32
    next_use: Any  # [V, E]
    listed: Any  # [2, V, M] demanded ids by falling mass, and by id (-1: none)
    listed_tokens: Any  # [2, V, M]
    demand_total: Any  # [L] demanded experts of the counted visits
    mass_total: Any  # [L] float32: their gate mass
    predicted_total: Any  # [L] selected experts
    right_total: Any  # [L] those of them that were demanded
    score: Any = None  # [V, E] keep-scores of the visited layer, for a policy that works them out from the routing
    wish_count: Any = None  # [V]
    wishes: Any = None  # [V, W] target x E + id, in the order of their copies
    selected: Any = None  # [V, H, E] int8
    drafting_s: Any = None  # [V, 2] float32
    turns: Any = None  # [V]


def columns_of(prepared: Prepared, setup: Setup, mix: Mix) -> Columns:
    """Works out the columns (numpy) of a mix, whose numbers are scalars."""
    mix = mix.at(0)  # of the eviction policy's numbers, which may vary, nothing here depends
    schedule, policies, columns = prepared.schedule, mix.build(), prepared.visits(setup, mix)
    visits: Any = columns  # numpy
    demand = visits.count > 0
    demanded = demand.sum(axis=1, dtype=np.int32)
    clock = _clock(demanded, visits.reset)
    wide = next_power_of_two(schedule.experts)
    listed = _listed(visits.by_mass, schedule.experts)
    tokens = np.where(listed >= 0, np.take_along_axis(visits.count[None], np.maximum(listed, 0), axis=2), 0)
    counted = visits.counted
    built = Columns(
        count=np.array([schedule.visits], np.int32),
        index=visits.index,
        layer=visits.layer,
        pass_id=visits.pass_id,
        tokens=visits.tokens,
        decode=visits.decode,
        starts_pass=visits.starts_pass,
        ends_layer=visits.ends_layer,
        reset=visits.reset,
        counted=counted,
        clock=clock,
        demanded=demanded,
        touch=_widened(np.where(demand, clock[:, None] + visits.rank, -1), wide, -1),
        mass=_widened(visits.mass, wide, 0),
        next_use=_widened(visits.next_use, wide, 0),
        listed=listed,
        listed_tokens=tokens,
        demand_total=_layer_sums(visits.layer, np.where(counted, demanded, 0), schedule.layers),
        mass_total=_layer_sums(visits.layer, np.where(counted[:, None], visits.mass, 0).sum(axis=1), schedule.layers),
        predicted_total=np.zeros(schedule.layers, np.int32),
        right_total=np.zeros(schedule.layers, np.int32),
        drafting_s=visits.drafting_s,
        turns=visits.turns,
    )
    rows = policies.eviction.rows
    if rows is not None and rows.scorer is not None:
        scores = _scores(prepared, mix.eviction)
        built = built._replace(score=_widened(_lengthened(scores, len(clock)), wide, 0))
    if policies.prefetch is not None:
        built = built._replace(**_predictions(setup, mix, columns, wide))
    return Columns(*(None if leaf is None else _plain(leaf) for leaf in built))


def _plain(leaf: Any) -> npt.NDArray[Any]:
    array = np.asarray(leaf)
    return array if array.dtype in (np.float32, np.int8) else array.astype(np.int32)


def _widened(table: npt.NDArray[Any], wide: int, fill: int) -> npt.NDArray[Any]:
    return np.pad(table, ((0, 0), (0, wide - table.shape[1])), constant_values=fill)


def _lengthened(table: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    return np.pad(table, ((0, rows - len(table)), (0, 0)))


def _clock(demanded: npt.NDArray[np.int32], reset: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Gives [V], demanded experts plus visits since the last reset, before each visit."""
    before = np.concatenate([[0], np.cumsum(demanded + 1)[:-1]])
    begins = np.maximum.accumulate(np.where(reset, before, 0))
    return (before - begins).astype(np.int32)


def _listed(by_mass: npt.NDArray[np.int32], experts: int) -> npt.NDArray[np.int32]:
    by_mass = np.pad(by_mass, ((0, 0), (0, next_power_of_two(by_mass.shape[1]) - by_mass.shape[1])), constant_values=-1)
    by_id = np.sort(np.where(by_mass < 0, experts, by_mass), axis=1)
    return np.stack([by_mass, np.where(by_id == experts, -1, by_id)])


def _scores(prepared: Prepared, eviction: Choice) -> npt.NDArray[np.int32]:
    """Gives [V, E], what the policy gives the experts of the visited layer."""
    schedule = prepared.schedule
    scores = Scores(eviction, schedule.layers, schedule.experts, everywhere=False)
    starts = range(0, schedule.visits, STRETCH)
    return np.concatenate([scores.draw(cut(prepared.demand, at, at + STRETCH), at) for at in starts])


def _layer_sums(layer: npt.NDArray[np.int32], numbers: npt.NDArray[Any], layers: int) -> npt.NDArray[Any]:
    """Gives [L], sums of [V] numbers over the visits of each layer."""
    found = np.zeros(layers, numbers.dtype)
    np.add.at(found, layer, numbers)
    return found


class _Foresight(NamedTuple):
    gate: Open
    prefetch: Any
    selection: Any
    predicted: jax.Array  # [L, E] bool


@partial(jax.jit, static_argnames="setup")
def _foresee(setup: Setup, mix: Mix, visits: Visit) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Want-scores of what is selected [V, H, E] (-inf: not), and how many selected for each visit [V], and rightly."""
    chosen, size = mix.build(), Size(setup.layers, setup.experts, setup.horizon)
    prefetch, selection = chosen.prefetch, chosen.selection
    assert prefetch is not None and selection is not None

    def blank() -> _Foresight:
        gate = Open(jnp.zeros(setup.experts, bool), jnp.zeros(setup.experts), jnp.asarray(True))
        nobody = jnp.zeros((setup.layers, setup.experts), bool)
        return _Foresight(gate, prefetch.init(size), selection.init(size), nobody)

    def again(old: _Foresight) -> _Foresight:
        fresh = blank()
        return fresh._replace(prefetch=renew(prefetch, old.prefetch, fresh.prefetch))

    def step(old: _Foresight, visit: Visit) -> tuple[_Foresight, tuple[jax.Array, jax.Array, jax.Array]]:
        if setup.resets:
            old = jax.lax.cond(visit.reset, again, lambda old: old, old)
        gate, closing = gather(old.gate, visit.count > 0, visit), visit.ends_layer
        predicted = old.predicted[visit.layer] & closing
        now = Now(visit.index, visit.layer, visit.pass_id, setup.layers)
        seen, rows = Gate(now, gate.demand, gate.mass, visit.ahead, visit.future), targets_of(setup, visit.layer)
        learned, memory, want, selected = foresee(
            prefetch, selection, (old.prefetch, old.selection), seen, size, closing
        )
        after = old.predicted.at[rows].set(jnp.where(closing, selected, old.predicted[rows]))
        right = jnp.sum(predicted & gate.demand, dtype=jnp.int32)
        found = jnp.where(selected, want, NO), jnp.sum(predicted, dtype=jnp.int32), right
        return _Foresight(gate, learned, memory, after), found

    return jax.lax.scan(step, blank(), visits)[1]


@partial(jax.jit, static_argnames="count")
def _first(wanted: jax.Array, count: int) -> jax.Array:
    """Gives [V, count], places of the highest, of equals the lower one first."""
    return jax.lax.top_k(wanted, count)[1]


def _predictions(
    setup: Setup,
    mix: Mix,
    visits: Visit,
    wide: int,
) -> dict[str, Any]:
    mix = jax.tree.map(np.asarray, mix)
    with on_host():
        wanted, predicted, right = (np.asarray(leaf) for leaf in _foresee(setup, mix, visits))
        selected = wanted > NO
        count = selected.sum(axis=(1, 2), dtype=np.int32)
        places = min(next_power_of_two(max(1, int(count.max()))), wanted[0].size)
        order = np.asarray(_first(wanted.reshape(len(wanted), -1), places))
    experts, counted, layer = wanted.shape[2], np.asarray(visits.counted), np.asarray(visits.layer)
    flat = order // experts * wide + order % experts
    return {
        "wish_count": count,
        "wishes": np.pad(flat, ((0, 0), (0, next_power_of_two(places) - places))),
        "selected": np.pad(selected, ((0, 0), (0, 0), (0, wide - experts))).astype(np.int8),
        "predicted_total": _layer_sums(layer, np.where(counted, predicted, 0), setup.layers),
        "right_total": _layer_sums(layer, np.where(counted, right, 0), setup.layers),
    }
