"""A visit of the predictors of `policies.adaptive` as one kernel: what the experts are scored from, the scores, and the
step of the weights; event for event, number for number what that module's own functions do.

All of it is one program, a row of experts across its lanes, that works in place on the predictor's memory. `[R, E']`
tables have the pair weights of all sources at once. The rules for single numbers are those of `policies.adaptive`; here
is how they are spread over lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.engines.gpu_visits import wrapped
from specmd_jax.loops import next_power_of_two
from specmd_jax.moe.kernels.placed import Token
from specmd_jax.moe.runtime.decider import Seen
from specmd_jax.policies import adaptive as rules
from specmd_jax.policies import use_history as history
from specmd_jax.policies.adaptive import SURE
from specmd_jax.policies.base import Pairs
from specmd_jax.policies.trained import odds

MOST_EXPERTS = 256
WIDE = next_power_of_two(rules.INPUTS)


class Given(NamedTuple):
    """What a visit only reads."""

    layer: Any  # [1] int32
    demand: tuple[Any, ...]  # of one token: ids [K] and gates [K]; of several: count and mass [E]
    numbers: Any  # [2] int32: rate and fade
    roots: Any  # `rules.ROOT`
    chances: Any  # `rules.SIGMOID`


class Row(NamedTuple):
    """The history of a layer's experts: what `History` has, each a row of lanes."""

    use: list[jax.Array]
    mass: list[jax.Array]
    age: jax.Array
    gap: jax.Array
    seen: jax.Array
    last: jax.Array


class Sources(NamedTuple):
    """Who speaks, [R]; see `rules.Said`."""

    row: jax.Array
    gate: jax.Array


class Known(NamedTuple):
    """Weights of a layer, as they were before the visit."""

    own: jax.Array  # [f']
    own_power: jax.Array  # [f']
    gain: jax.Array
    gain_power: jax.Array
    pairs: jax.Array  # [R, E']
    times: jax.Array  # [R]


def serves(experts: int) -> bool:
    """Says whether a layer has few enough experts for the lanes of one program."""
    return experts <= MOST_EXPERTS


def score(pairs: Pairs, memory: Any, seen: Seen | Token, *, interpret: bool) -> tuple[Any, jax.Array]:
    """Takes a visit of the `adaptive` eviction policy's scorer: its memory, and the scores [E] int32."""
    experts = memory.pairs.shape[1]

    def body(visit: _Visit, memory: Any, out: Any) -> None:
        layer, said = visit.layer, memory.said
        never = memory.chance[layer, 0] < 0
        before = Sources(visit.of_sources(said.row, visit.rows), visit.of_sources(said.gate, 0))
        before = before._replace(row=jnp.where(never, visit.rows, before.row))
        then_inputs, then_pairs = visit.inputs(visit.row(layer)), visit.lane(memory.pairs, layer)
        then_chance = visit.lane(memory.chance, layer)
        visit.remember()
        given, inputs = visit.sources_of(layer), visit.inputs(visit.row(layer))
        now, then = visit.known(layer, given), visit.known(layer, before)
        logit, spoken = visit.scored(now, inputs, given)
        chance = visit.chance(logit)
        target = jnp.where(visit.demand, SURE, visit.given.numbers[1] * chance >> 10)
        error = jnp.where(never | ~visit.real, 0, target - then_chance)
        visit.barrier()  # all that is read of the weights has been
        visit.correct(layer, then, then_inputs, before, then_pairs, error)
        visit.put_of_sources(said.row, given.row)
        visit.put_of_sources(said.gate, given.gate)
        visit.put_lane(memory.pairs, spoken, layer)
        visit.put_lane(memory.chance, chance, layer)
        triton.store(out.at[visit.ids], logit, mask=visit.real)

    return _call(body, pairs, memory, seen, jax.ShapeDtypeStruct((experts,), jnp.int32), interpret)


def foresee(pairs: Pairs, memory: Any, seen: Seen | Token, horizon: int, *, interpret: bool) -> tuple[Any, jax.Array]:
    """Takes a visit of the `adaptive` prefetch policy: its memory, and how much it wants [H, E] float32 the experts of
    the next layers."""
    layers, experts = memory.history.age.shape

    def body(visit: _Visit, memory: Any, out: Any) -> None:
        del memory  # the visit has it
        layer = visit.layer
        given, inputs = visit.sources_of(layer), visit.inputs(visit.row(layer))
        known = visit.known(layer, given)
        logit, spoken = visit.scored(known, inputs, given)
        chance = visit.chance(logit)
        error = jnp.where(visit.real, jnp.where(visit.demand, SURE, 0) - chance, 0)
        visit.barrier()  # all that is read of the weights has been
        visit.correct(layer, known, inputs, given, spoken, error)
        visit.remember()
        for skip in range(horizon):
            target = wrapped(layer + 1 + skip, layers)
            given = visit.sources_of(target, skip)
            logit, _ = visit.scored(visit.known(target, given), visit.inputs(visit.row(target)), given)
            triton.store(out.at[jnp.int32(skip), visit.ids], odds(logit), mask=visit.real)

    return _call(body, pairs, memory, seen, jax.ShapeDtypeStruct((horizon, experts), jnp.float32), interpret)


def _call(
    body: Any, pairs: Pairs, memory: Any, seen: Seen | Token, out: jax.ShapeDtypeStruct, interpret: bool
) -> tuple[Any, jax.Array]:
    experts = memory.history.age.shape[1]
    given = Given(
        layer=seen.layer.reshape(1),
        demand=(seen.ids, seen.gates) if isinstance(seen, Token) else (seen.count, seen.mass),
        numbers=jnp.stack([jnp.asarray(number, jnp.int32) for number in pairs]),
        roots=jnp.asarray(rules.ROOT),
        chances=jnp.asarray(rules.SIGMOID),
    )
    fixed, whole = len(jax.tree.leaves(given)), len(jax.tree.leaves(memory))

    def kernel(given: Given, _: Any, memory: Any, out: Any) -> None:
        body(_Visit(given, memory, isinstance(seen, Token), interpret), memory, out)

    return pl.pallas_call(
        kernel,
        grid=(1,),
        out_shape=(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), memory), out),
        input_output_aliases={fixed + place: place for place in range(whole)},
        interpret=interpret,
        # a thread has some 64 numbers of a table of pairs
        compiler_params=triton.CompilerParams(num_warps=max(next_power_of_two(experts) // 16, 1), num_stages=1),
        name="pairs",
    )(given, memory)


class _Visit:
    """What both predictors do at a visit; arguments are references to memory."""

    def __init__(self, given: Given, memory: Any, one_token: bool, interpret: bool) -> None:
        self.given, self.weights, self.history, self.recent = given, memory.weights, memory.history, memory.recent
        self.interpret, self.layer = interpret, given.layer[0]
        self.layers, self.experts = memory.history.age.shape
        self.near, self.most = min(rules.NEAR, self.layers - 1), memory.recent.expert.shape[2]
        self.sources = rules.sources_of(self.layers) * self.most
        self.rows = rules.sources_of(self.layers) * self.experts
        self.ids = jnp.arange(next_power_of_two(self.experts), dtype=jnp.int32)
        self.real = self.ids < self.experts
        self.places = jnp.arange(next_power_of_two(self.sources), dtype=jnp.int32)  # R
        # `%` beside a plain number fails to lower where another loop has used it
        self.split = tuple(f(self.places, jnp.full_like(self.places, self.most)) for f in (jax.lax.div, jax.lax.rem))
        self.lanes = jnp.arange(WIDE, dtype=jnp.int32)  # f'
        self.demand, self.mass = self._one(*given.demand) if one_token else self._several(*given.demand)

    def _one(self, ids: Any, gates: Any) -> tuple[jax.Array, jax.Array]:
        demand, mass = jnp.zeros(self.ids.shape, jnp.int32), jnp.zeros(self.ids.shape, jnp.float32)
        for place in range(ids.shape[0]):
            here = self.ids == ids[place]
            demand, mass = jnp.where(here, 1, demand), jnp.where(here, gates[place], mass)
        return demand > 0, mass

    def _several(self, count: Any, mass: Any) -> tuple[jax.Array, jax.Array]:
        demand = triton.load(count.at[self.ids], mask=self.real, other=0) > 0
        return demand, jnp.where(demand, triton.load(mass.at[self.ids], mask=self.real, other=0), 0.0)

    def barrier(self) -> None:
        """Lets all lanes read what one has written."""
        if not self.interpret:
            triton.debug_barrier()

    def lane(self, ref: Any, *where: Any) -> jax.Array:
        """Loads a number of each expert [E']."""
        return triton.load(ref.at[(*where[:1], self.ids, *where[1:])], mask=self.real, other=0)

    def put_lane(self, ref: Any, values: jax.Array, *where: Any) -> None:
        """Writes a number of each expert."""
        triton.store(ref.at[(*where[:1], self.ids, *where[1:])], values, mask=self.real)

    def of_sources(self, ref: Any, other: Any) -> jax.Array:
        """Loads a number of each source of the visited layer [R]."""
        return triton.load(ref.at[self.layer, self.places], mask=self.places < self.sources, other=other)

    def put_of_sources(self, ref: Any, values: jax.Array) -> None:
        """Writes a number of each source of the visited layer."""
        triton.store(ref.at[self.layer, self.places], values, mask=self.places < self.sources)

    def row(self, layer: jax.Array) -> Row:
        """Loads the history of a layer's experts."""
        kept = self.history
        return Row(
            use=[self.lane(kept.use, layer, jnp.int32(d)) for d in range(len(history.DECAYS))],
            mass=[self.lane(kept.mass, layer, jnp.int32(d)) for d in range(len(history.MASS_DECAYS))],
            age=self.lane(kept.age, layer),
            gap=self.lane(kept.gap, layer),
            seen=self.lane(kept.seen, layer),
            last=self.lane(kept.last, layer),
        )

    def inputs(self, row: Row) -> jax.Array:
        """Gives `rules.inputs` [f', E']."""
        use = [_share(value, decay) for value, decay in zip(row.use, history.DECAYS, strict=True)]
        mass = [_share(value, decay) for value, decay in zip(row.mass, history.MASS_DECAYS, strict=True)]
        found = [
            *(history.whole(share) for share in use),
            *(history.log2(share * 256.0) for share in use),
            *(history.whole(share) for share in mass),
            history.whole(row.last),
            *(history.log2((count + 1).astype(jnp.float32)) for count in (row.age, row.gap, row.seen)),
            jnp.full(self.ids.shape, 256, jnp.int32),
        ]
        table = jnp.zeros((WIDE, self.ids.shape[0]), jnp.int32)
        for number, lane in enumerate(found):
            table = jnp.where(self.lanes[:, None] == number, lane[None, :], table)
        return table

    def remember(self) -> None:
        """Writes the visit into histories and latest demands."""
        kept, layer = self.history, self.layer
        row, mass = self.row(layer), jnp.where(self.demand, self.mass, 0.0)
        used = self.demand.astype(jnp.float32)
        ranked, weight = self._newest()
        slots = jnp.arange(ranked.shape[0], dtype=jnp.int32)
        there = slots < self.most
        older = [
            [triton.load(ref.at[layer, jnp.int32(ago), slots], mask=there, other=0) for ago in range(rules.OWN - 1)]
            for ref in self.recent
        ]
        self.barrier()  # all that is read of them has been
        for d, (value, decay) in enumerate(zip(row.use, history.DECAYS, strict=True)):
            self.put_lane(kept.use, history.faded(value, used, jnp.float32(decay)), layer, jnp.int32(d))
        for d, (value, decay) in enumerate(zip(row.mass, history.MASS_DECAYS, strict=True)):
            self.put_lane(kept.mass, history.faded(value, mass, jnp.float32(decay)), layer, jnp.int32(d))
        self.put_lane(kept.age, jnp.where(self.demand, 0, jnp.minimum(row.age + 1, history.NEVER_USED)), layer)
        self.put_lane(kept.gap, jnp.where(self.demand, row.age, row.gap), layer)
        self.put_lane(kept.seen, row.seen + 1, layer)
        self.put_lane(kept.last, mass, layer)
        for ref, newest, old in zip(self.recent, (ranked, weight), older, strict=True):
            for ago, values in enumerate((newest, *old)):
                triton.store(ref.at[layer, jnp.int32(ago), slots], values, mask=there)
        self.barrier()

    def _newest(self) -> tuple[jax.Array, jax.Array]:
        """Gives the visit's experts by falling gate, of equals the lower id first, and their gates as sources show
        them."""
        key = jnp.where(self.demand, self.mass, -1.0)
        ahead = (key[:, None] > key[None, :]) | ((key[:, None] == key[None, :]) & (self.ids[:, None] < self.ids[None]))
        rank = jnp.sum(ahead.astype(jnp.int32), axis=0)
        slots = jnp.arange(next_power_of_two(self.most), dtype=jnp.int32)
        expert = jnp.sum(jnp.where(rank[None, :] == slots[:, None], self.ids[None, :], 0), axis=1)
        count = jnp.minimum(jnp.sum(self.demand.astype(jnp.int32)), self.most)
        return jnp.where(slots < count, expert, -1), rules.shown(slots, count)

    def sources_of(self, layer: jax.Array, skip: int = 0) -> Sources:
        """Gives who speaks for a layer's experts, as `rules.said`."""
        source, place = self.split
        near = source < self.near
        before = layer - 1 - source
        at = jnp.where(near, jnp.where(before < 0, before + self.layers, before), layer)
        where = at, jnp.where(near, 0, source - self.near), place
        real = self.places < self.sources
        expert = triton.load(self.recent.expert.at[where], mask=real, other=-1)
        known = (expert >= 0) & (~near | (source >= skip))
        gate = triton.load(self.recent.gate.at[where], mask=real, other=0)
        return Sources(
            jnp.where(known, source * self.experts + expert, self.rows),
            jnp.where(known, gate, 0),
        )

    def known(self, layer: jax.Array, sources: Sources) -> Known:
        """Loads what scoring and correcting need of the weights."""
        kept, mine, there = self.weights, self.lanes < rules.INPUTS, sources.row < self.rows
        where, real = self._table(layer, sources)
        return Known(
            own=triton.load(kept.history.at[layer, self.lanes], mask=mine, other=0),
            own_power=triton.load(kept.history_power.at[layer, self.lanes], mask=mine, other=1.0),
            gain=kept.gain[layer, 0],
            gain_power=kept.gain_power[layer, 0],
            pairs=triton.load(where, mask=real, other=0),
            times=triton.load(kept.times.at[layer, sources.row], mask=there, other=rules.EARLY),
        )

    def _table(self, layer: jax.Array, sources: Sources) -> tuple[Any, jax.Array]:
        """Gives where the pairs of sources are, and which of them are real [R, E']."""
        shape = sources.row.shape[0], self.ids.shape[0]
        row, expert = jnp.broadcast_to(sources.row[:, None], shape), jnp.broadcast_to(self.ids[None, :], shape)
        return self.weights.pairs.at[layer, row, expert], (row < self.rows) & (expert < self.experts)

    def scored(self, known: Known, inputs: jax.Array, sources: Sources) -> tuple[jax.Array, jax.Array]:
        """Gives logits, and the part by pairs [E']."""
        own = jnp.sum((known.own >> 6)[:, None] * inputs, axis=0) >> 10
        pairs = rules.spoken(jnp.sum((known.pairs >> 4) * sources.gate[:, None], axis=0))
        return own + (known.gain * pairs >> 12), pairs

    def correct(
        self, layer: jax.Array, known: Known, inputs: jax.Array, sources: Sources, pairs: jax.Array, error: jax.Array
    ) -> None:
        """Writes the weights after a step against the error of scores that came of these."""
        kept, mine, there = self.weights, self.lanes < rules.INPUTS, sources.row < self.rows
        power = known.own_power + rules.power_of(jnp.sum(rules.strength(error[None, :], inputs), axis=1))
        slope = jnp.sum((error >> 2)[None, :] * inputs, axis=1)
        moved = rules.own_moved(known.own, slope, self._root(power))
        triton.store(kept.history.at[layer, self.lanes], moved, mask=mine)
        triton.store(kept.history_power.at[layer, self.lanes], power, mask=mine)

        share_power = known.gain_power + rules.power_of(jnp.sum(rules.share_strength(error, pairs)))
        share_slope = jnp.sum(rules.near(error * pairs, 12))
        root = self.given.roots[rules.root_place(share_power)]
        kept.gain[layer, 0] = rules.share_moved(known.gain, share_slope, root)
        kept.gain_power[layer, 0] = share_power

        times = known.times + 1
        steps = rules.pace(self._root(times.astype(jnp.float32)), self.given.numbers[0])
        new = rules.pair_moved(known.pairs, error[None, :], sources.gate[:, None], steps[:, None])
        where, real = self._table(layer, sources)
        triton.store(where, new, mask=real)
        triton.store(kept.times.at[layer, sources.row], times, mask=there)
        self.barrier()

    def chance(self, logit: jax.Array) -> jax.Array:
        """Gives `rules.chance` [E']."""
        return triton.load(self.given.chances.at[rules.sigmoid_place(logit)])

    def _root(self, power: jax.Array) -> jax.Array:
        return triton.load(self.given.roots.at[rules.root_place(power)])


def _share(value: jax.Array, decay: float) -> jax.Array:
    return value * jnp.float32(history.share_of(decay))
