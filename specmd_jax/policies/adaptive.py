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
_WIDEST = 8 << 20  # a weight of a history
_PAIR = 4 << 20
_GAIN = 1 << 12
SHARP = 32767  # the largest sum of pairs that a gain multiplies
_EARLY = 10  # uses that every source is taken to have had

_SIGMOID = np.rint(SURE / (1 + np.exp(-(np.arange(-512, 512) + 0.5) / 64))).astype(np.int32)
_ROOT = np.maximum(
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
        gain=jnp.full((layers, 1), _GAIN, jnp.int32),
        gain_power=jnp.ones((layers, 1), jnp.float32),
        trust=jnp.full((layers, 1), _GAIN, jnp.int32),
        trust_power=jnp.ones((layers, 1), jnp.float32),
        pairs=jnp.zeros((layers, rows, experts), jnp.int32),
        times=jnp.full((layers, rows), _EARLY, jnp.int32),
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
    there = place < count
    shown = jnp.where(there, 24 - 16 * place // jnp.maximum(count - 1, 1), 0)
    new = jnp.where(there, expert, -1), shown
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
                weights.times.at[layer, one.said.row].get(mode="fill", fill_value=_EARLY),
            )
            for one in given
        ),
        layer >= 0,
    )


def scored(known: Layer, given: Seen) -> Found:
    """Gives the scores of a layer's experts."""
    own = jnp.sum((known.history >> 6)[None] * given.inputs, axis=-1) >> 10
    spoken = jnp.sum((known.pairs >> 4) * given.said.gate[:, None], axis=0) >> 8
    pairs = jnp.clip(spoken, -SHARP, SHARP)
    return Found(own + (known.gain * pairs >> 12) + (known.trust * given.said.told >> 12), pairs)


def chance(logit: Int32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives the probability of a logit, 0..SURE."""
    return jnp.asarray(_SIGMOID)[jnp.clip((logit >> 6) + 512, 0, 1023)]


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
    power = known.history_power + _power(jnp.sum((error[:, None] * given.inputs >> 14) ** 2, axis=0))
    slope = jnp.sum((error >> 2)[:, None] * given.inputs, axis=0) >> 8
    own = known.history + _near(slope * _step(power, 205), 8)

    gain, gain_power = _share(known.gain, known.gain_power, pairs, error)
    trust, trust_power = _share(known.trust, known.trust_power, given.said.told, error)

    times = known.times + 1
    pace = jnp.maximum(_root(times.astype(jnp.float32)) * rate >> 12, 1)  # [s]
    moved = known.pairs + _near(error[None] * given.said.gate[:, None] * pace[:, None], 10)
    return Weights(
        history=weights.history.at[layer].set(jnp.clip(own, -_WIDEST, _WIDEST)),
        history_power=weights.history_power.at[layer].set(power),
        gain=weights.gain.at[layer].set(gain),
        gain_power=weights.gain_power.at[layer].set(gain_power),
        trust=weights.trust.at[layer].set(trust),
        trust_power=weights.trust_power.at[layer].set(trust_power),
        pairs=weights.pairs.at[layer, given.said.row].set(jnp.clip(moved, -_PAIR, _PAIR), mode="drop"),
        times=weights.times.at[layer, given.said.row].set(times, mode="drop"),
    )


def _share(
    share: Int32[Array, " 1"], power: Float32[Array, " 1"], part: Int32[Array, " E"], error: Int32[Array, " E"]
) -> tuple[Int32[Array, " 1"], Float32[Array, " 1"]]:
    """Gives a factor of a part of the logits, and its power, after a step."""
    power = power + _power(jnp.sum(jnp.clip(error * part >> 18, -1023, 1023) ** 2))
    slope = _near(jnp.sum(_near(error * part, 12)), 2)
    return jnp.clip(share + _near(slope * _step(power, 102), 16), 0, 2 * _GAIN), power


def _near(value: Int32[Array, " *n"], bits: int) -> Int32[Array, " *n"]:
    """Gives value / 2^bits, the nearest."""
    return value + (1 << bits - 1) >> bits


def _power(squares: Int32[Array, " *n"]) -> Float32[Array, " *n"]:
    return squares.astype(jnp.float32) * jnp.float32(2**-12)


def _root(value: Float32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives SURE / sqrt(value) for values from 1 on, by quarters of an octave: read off the bits of the float32."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.asarray(_ROOT)[jnp.clip((bits >> 21) - (127 << 2), 0, len(_ROOT) - 1)]


def _step(power: Float32[Array, " *n"], rate: int) -> Int32[Array, " *n"]:
    return jnp.maximum(_root(power) * rate >> 10, 1)
