"""A predictor that adapts to a model while its routing runs, knows no expert by name, and rounds nowhere.

It scores each expert of a layer by a logit, in 1/4096: the sum of

* its history (`use_history.features` and a constant), each times a weight of the layer, and
* pair weights: each expert used in lately visited layers, and in the layer's own last visits (*sources*), speaks for
  or against each expert of the layer, the more the larger its gate. The layer has a gain for their sum.

All weights of a layer move along the logistic loss, in steps that shrink with the root of what moved them before:
the history's and the gain's with the squares of their slopes (Adagrad), a source's with the times it was there.

Histories begin anew with a request; weights are carried over, so that a model is learned over requests. They start at
nothing: weights and networks learned on other models were tried as a start, and were worth nothing after some hundred
tokens (learn/README.md).

Units: inputs 1/256, gates 1/16, weights 2^-20, gains and logits 2^-12, probabilities 2^-14. Sums are of integers, so
that their order does not matter; powers are float32 that take one addend per visit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.loops import settled
from specmd_jax.policies import use_history as history
from specmd_jax.policies.use_history import History

NEAR = 12  # visits before the layer's that are sources, at most one of each other layer
OWN = 4  # visits of the layer itself that are
MOST = 8  # experts of a source, those with the largest gates
INPUTS = history.FEATURES + 1
SURE = 1 << 14  # a probability of 1
WIDEST = 8 << 20  # a weight of a history
MOST_PAIR = 4 << 20
GAIN = 1 << 12
SHARP = 32767  # the largest sum of pairs that a gain multiplies
EARLY = 10  # uses that every source is taken to have had

SIGMOID = np.rint(SURE / (1 + np.exp(-(np.arange(-512, 512) + 0.5) / 64))).astype(np.int32)
ROOT = np.maximum(
    np.rint(SURE / np.sqrt(2.0 ** (np.arange(192) // 4) * (1 + (np.arange(192) % 4 + 0.5) / 4))), 1
).astype(np.int32)
"""SURE / sqrt(x) in the middle of each quarter of an octave from 1 on."""


class Weights(NamedTuple):
    """What has been learned of all layers."""

    history: Int32[Array, "L f"]
    history_power: Float32[Array, "L f"]
    gain: Int32[Array, "L 1"]
    gain_power: Float32[Array, "L 1"]
    trust: Int32[Array, "L 1"]  # in what a trained predictor says, if there is one
    trust_power: Float32[Array, "L 1"]
    pairs: Int32[Array, "L all E"]  # of (source, its expert), with the layer's experts
    times: Int32[Array, "L all"]  # that each was a source


class Layer(NamedTuple):
    """What of them one layer's scores need, from some sources."""

    history: Int32[Array, " f"]
    history_power: Float32[Array, " f"]
    gain: Int32[Array, " 1"]
    gain_power: Float32[Array, " 1"]
    trust: Int32[Array, " 1"]
    trust_power: Float32[Array, " 1"]
    pairs: Int32[Array, "s E"]
    times: Int32[Array, " s"]


class Recent(NamedTuple):
    """The latest demands of each layer, the newest first: up to `MOST` experts each, by falling gate."""

    expert: Int32[Array, "L OWN MOST"]  # -1: none
    gate: Int32[Array, "L OWN MOST"]  # 24 for the largest down to 8, sixteenths


class Said(NamedTuple):
    """What speaks for a layer's experts beside their histories; of all layers with the leading axis L."""

    told: Int32[Array, " *layers E"]  # logits by a trained predictor, -SHARP..SHARP; 0: there is none
    row: Int32[Array, " *layers s"]  # of the layer's `Weights.pairs`; none: their number
    gate: Int32[Array, " *layers s"]  # 0: none


class Seen(NamedTuple):
    """What a layer's experts are scored from."""

    inputs: Int32[Array, "E f"]
    said: Said

    def forgotten(self, when: Bool[Array, ""], weights: Weights) -> Seen:
        """Gives it without sources where it was never there."""
        return self._replace(said=self.said._replace(row=jnp.where(when, weights.times.shape[1], self.said.row)))


Trained = Callable[[History, Int32[Array, ""]], Int32[Array, " E"]]
"""Logits of a layer's experts by a trained predictor."""


class Found(NamedTuple):
    """Scores of a layer's experts."""

    logit: Int32[Array, " E"]
    pairs: Int32[Array, " E"]  # the part that the gain multiplies


def sources_of(layers: int) -> int:
    return min(NEAR, layers - 1) + OWN


def begin(layers: int, experts: int, logit: int) -> Weights:
    """Gives the weights before anything was seen, when all experts have the same whole logit."""
    rows = sources_of(layers) * experts
    first = jnp.zeros(INPUTS, jnp.int32).at[-1].set(logit << 20)
    return Weights(
        history=jnp.broadcast_to(first, (layers, INPUTS)),
        history_power=jnp.ones((layers, INPUTS), jnp.float32),
        gain=jnp.full((layers, 1), GAIN, jnp.int32),
        gain_power=jnp.ones((layers, 1), jnp.float32),
        trust=jnp.full((layers, 1), GAIN, jnp.int32),
        trust_power=jnp.ones((layers, 1), jnp.float32),
        pairs=jnp.zeros((layers, rows, experts), jnp.int32),
        times=jnp.full((layers, rows), EARLY, jnp.int32),
    )


def nobody(layers: int, experts: int) -> Recent:
    """Gives the latest demands before the first."""
    shape = layers, OWN, min(MOST, experts)
    return Recent(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.int32))


def after(recent: Recent, layer: Int32[Array, ""], demand: Bool[Array, " E"], mass: Float32[Array, " E"]) -> Recent:
    """Gives the latest demands after one more visit of a layer."""
    most = recent.expert.shape[-1]
    _, expert = jax.lax.top_k(jnp.where(demand, mass, -1.0), most)
    count = jnp.minimum(jnp.sum(demand, dtype=jnp.int32), most)
    place = jnp.arange(most, dtype=jnp.int32)
    new = jnp.where(place < count, expert, -1), shown(place, count)
    rows = (jnp.concatenate([one[None], old[layer, :-1]]) for one, old in zip(new, recent, strict=True))
    return Recent(*(old.at[layer].set(row) for old, row in zip(recent, rows, strict=True)))


def inputs(memory: History, layer: Int32[Array, ""]) -> Int32[Array, "E f"]:
    """Gives what the histories of a layer's experts say, and a constant."""
    found = history.features(jax.tree.map(lambda table: table[layer], memory))
    return jnp.concatenate([found, jnp.full((found.shape[0], 1), 256, jnp.int32)], axis=-1)


def said(
    memory: History,
    recent: Recent,
    layer: Int32[Array, ""],
    skip: int | Int32[Array, ""] = 0,
    trained: Trained | None = None,
) -> Said:
    """Gives what else the experts of a layer are scored from; the nearest `skip` visits before it are not known."""
    layers, experts = memory.age.shape
    near, sources = min(NEAR, layers - 1), sources_of(layers)
    back = jnp.arange(near, dtype=jnp.int32)
    before = jnp.mod(layer - 1 - back, layers)
    expert = jnp.concatenate([recent.expert[before, 0], recent.expert[layer]])  # [J, MOST]
    gate = jnp.concatenate([recent.gate[before, 0], recent.gate[layer]])
    known = (expert >= 0) & jnp.concatenate([back >= skip, jnp.ones(OWN, bool)])[:, None]
    row = jnp.where(known, jnp.arange(sources, dtype=jnp.int32)[:, None] * experts + expert, sources * experts)
    told = jnp.zeros(experts, jnp.int32) if trained is None else jnp.clip(trained(memory, layer), -SHARP, SHARP)
    return Said(told, row.reshape(-1), jnp.where(known, gate, 0).reshape(-1))


def seen(memory: History, recent: Recent, layer: Int32[Array, ""], skip: int | Int32[Array, ""] = 0) -> Seen:
    """Gives all that the experts of a layer are scored from."""
    return Seen(inputs(memory, layer), said(memory, recent, layer, skip))


def read(weights: Weights, layer: Int32[Array, ""], *given: Seen) -> tuple[Layer, ...]:
    """Gives what scoring and correcting need of the weights, all of it read before anything is written."""
    # the pairs are the largest table of all: read after a write, they would be copied at every visit
    return settled(
        tuple(
            Layer(
                weights.history[layer],
                weights.history_power[layer],
                weights.gain[layer],
                weights.gain_power[layer],
                weights.trust[layer],
                weights.trust_power[layer],
                weights.pairs.at[layer, one.said.row].get(mode="fill", fill_value=0),
                weights.times.at[layer, one.said.row].get(mode="fill", fill_value=EARLY),
            )
            for one in given
        ),
        layer >= 0,
    )


def scored(known: Layer, given: Seen) -> Found:
    """Gives the scores of a layer's experts."""
    own = jnp.sum((known.history >> 6)[None] * given.inputs, axis=-1) >> 10
    pairs = spoken(jnp.sum((known.pairs >> 4) * given.said.gate[:, None], axis=0))
    return Found(own + (known.gain * pairs >> 12) + (known.trust * given.said.told >> 12), pairs)


def spoken(total: Int32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives the part of logits by pairs, from sums of (weight / 16) x gate."""
    return jnp.clip(total >> 8, -SHARP, SHARP)


def shown(place: Int32[Array, " *n"], count: Int32[Array, ""]) -> Int32[Array, " *n"]:
    """Gives the gates of a source's experts by their places."""
    return jnp.where(place < count, 24 - 16 * place // jnp.maximum(count - 1, 1), 0)


def chance(logit: Int32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives the probability of a logit, 0..SURE."""
    return jnp.asarray(SIGMOID)[sigmoid_place(logit)]


def sigmoid_place(logit: Int32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives a logit's place in `SIGMOID`."""
    return jnp.clip((logit >> 6) + 512, 0, len(SIGMOID) - 1)


def corrected(
    weights: Weights,
    known: Layer,
    layer: Int32[Array, ""],
    given: Seen,
    pairs: Int32[Array, " E"],
    error: Int32[Array, " E"],
    rate: Int32[Array, ""],
) -> Weights:
    """Gives the weights after a step of `rate` (1/1024) against the `error` (SURE: 1) of the scores of these inputs."""
    power = known.history_power + power_of(jnp.sum(strength(error[:, None], given.inputs), axis=0))
    slope = jnp.sum((error >> 2)[:, None] * given.inputs, axis=0)

    gain, gain_power = _share(known.gain, known.gain_power, pairs, error)
    trust, trust_power = _share(known.trust, known.trust_power, given.said.told, error)

    times = known.times + 1
    steps = pace(_root(times.astype(jnp.float32)), rate)
    moved = pair_moved(known.pairs, error[None], given.said.gate[:, None], steps[:, None])
    return Weights(
        history=weights.history.at[layer].set(own_moved(known.history, slope, _root(power))),
        history_power=weights.history_power.at[layer].set(power),
        gain=weights.gain.at[layer].set(gain),
        gain_power=weights.gain_power.at[layer].set(gain_power),
        trust=weights.trust.at[layer].set(trust),
        trust_power=weights.trust_power.at[layer].set(trust_power),
        pairs=weights.pairs.at[layer, given.said.row].set(moved, mode="drop"),
        times=weights.times.at[layer, given.said.row].set(times, mode="drop"),
    )


def _share(
    share: Int32[Array, " 1"], power: Float32[Array, " 1"], part: Int32[Array, " E"], error: Int32[Array, " E"]
) -> tuple[Int32[Array, " 1"], Float32[Array, " 1"]]:
    """Gives a factor of a part of the logits, and its power, after a step."""
    power = power + power_of(jnp.sum(share_strength(error, part)))
    return share_moved(share, jnp.sum(near(error * part, 12)), _root(power)), power


# ----------------------------------------------------------------- rules for single numbers, which a kernel takes, too


def strength(error: Int32[Array, " *#n"], given: Int32[Array, " *#n"]) -> Int32[Array, "..."]:
    """Gives the square of the slope of an input's weight."""
    return (error * given >> 14) ** 2


def own_moved(
    weight: Int32[Array, " *n"], slope: Int32[Array, " *n"], root: Int32[Array, " *n"]
) -> Int32[Array, " *n"]:
    """Gives a history's weight after a step along a sum of (error / 4) x input."""
    return jnp.clip(weight + near((slope >> 8) * jnp.maximum(root * 205 >> 10, 1), 8), -WIDEST, WIDEST)


def share_strength(error: Int32[Array, " *n"], part: Int32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives the square of the slope of a factor of that part of a logit."""
    return jnp.clip(error * part >> 18, -1023, 1023) ** 2


def share_moved(
    share: Int32[Array, " *#n"], slope: Int32[Array, " *#n"], root: Int32[Array, " *#n"]
) -> Int32[Array, "..."]:
    """Gives a factor after a step along a sum of error x part, in 4096ths."""
    return jnp.clip(share + near(near(slope, 2) * jnp.maximum(root * 102 >> 10, 1), 16), 0, 2 * GAIN)


def pace(root: Int32[Array, " *n"], rate: Int32[Array, ""]) -> Int32[Array, " *n"]:
    """Gives the step of a source's pairs."""
    return jnp.maximum(root * rate >> 12, 1)


def pair_moved(
    pairs: Int32[Array, " *#n"], error: Int32[Array, " *#n"], gate: Int32[Array, " *#n"], steps: Int32[Array, " *#n"]
) -> Int32[Array, "..."]:
    """Gives pair weights after a step."""
    return jnp.clip(pairs + near(error * gate * steps, 10), -MOST_PAIR, MOST_PAIR)


def near(value: Int32[Array, " *n"], bits: int) -> Int32[Array, " *n"]:
    """Gives value / 2^bits, the nearest."""
    return value + (1 << bits - 1) >> bits


def power_of(squares: Int32[Array, " *n"]) -> Float32[Array, " *n"]:
    """Gives what a sum of squared slopes adds to a power."""
    return squares.astype(jnp.float32) * jnp.float32(2**-12)


def _root(value: Float32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives SURE / sqrt(value) for values from 1 on, by quarters of an octave: read off the bits of the float32."""
    return jnp.asarray(ROOT)[root_place(value)]


def root_place(value: Float32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives the place of a value from 1 on in `ROOT`."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.clip((bits >> 21) - (127 << 2), 0, len(ROOT) - 1)
