"""What the learned policies remember of each expert, from ids and gates alone, and how they see it: small integers.

Every feature is an integer of 0..255. A trained predictor multiplies them with integer weights, and sums of products
below 2^24 are exact in float32 whatever the order of summation, so that every device and the reference agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

DECAYS = (0.5, 0.7, 0.84, 0.92, 0.96, 0.98, 0.992)  # of the averages of use, per visit of the layer
MASS_DECAYS = (0.84, 0.98)  # of the averages of gate mass
FEATURES = 2 * len(DECAYS) + len(MASS_DECAYS) + 4
TOP = 255
TOP_WAVE = 32
TOPIC = DECAYS.index(0.98)
NEVER_USED = 1 << 20  # age of what was never used


class History(NamedTuple):
    """Uses of the experts so far; `at` is L for a table, the target layers for some rows, nothing for one row."""

    use: Float32[Array, " *at E 7"]  # fading counts of use
    mass: Float32[Array, " *at E 2"]  # fading sums of gate mass
    age: Int32[Array, " *at E"]  # visits of the layer since the last use (0: the latest visit used it)
    gap: Int32[Array, " *at E"]  # the age that its latest use ended
    seen: Int32[Array, " *at E"]  # visits of the layer
    last: Float32[Array, " *at E"]  # gate mass at the latest visit, 0 where it was not used


def blank(*shape: int) -> History:
    """Gives the history before the first visit; `shape` is (L, E)."""
    never = jnp.full(shape, NEVER_USED, jnp.int32)
    return History(
        use=jnp.zeros((*shape, len(DECAYS)), jnp.float32),
        mass=jnp.zeros((*shape, len(MASS_DECAYS)), jnp.float32),
        age=never,
        gap=never,
        seen=jnp.zeros(shape, jnp.int32),
        last=jnp.zeros(shape, jnp.float32),
    )


def seen(row: History, demand: Bool[Array, " *at E"], mass: Float32[Array, " *at E"]) -> History:
    """Gives the history after one more visit of a layer, with this `demand` and its gate `mass`."""
    mass = jnp.where(demand, mass, 0.0)
    return History(
        use=used(row.use, demand),
        mass=_faded(row.mass, mass, MASS_DECAYS),
        age=jnp.where(demand, 0, jnp.minimum(row.age + 1, NEVER_USED)),
        gap=jnp.where(demand, row.age, row.gap),
        seen=row.seen + 1,
        last=mass,
    )


def visited(memory: History, layer: Int32[Array, ""], demand: Bool[Array, " E"], mass: Float32[Array, " E"]) -> History:
    """Gives the tables of all layers after one more visit of a layer."""
    row = seen(jax.tree.map(lambda table: table[layer], memory), demand, mass)
    return jax.tree.map(lambda table, new: table.at[layer].set(new), memory, row)


def used(use: Float32[Array, " *at E 7"], demand: Bool[Array, " *at E"]) -> Float32[Array, " *at E 7"]:
    """Gives `History.use` after one more visit with this `demand`."""
    return _faded(use, demand.astype(jnp.float32), DECAYS)


def shares(use: Float32[Array, " *at E 7"]) -> Int32[Array, " *at E 7"]:
    """Integers of 0..255: `History.use` as shares of the layer's visits, in 256ths."""
    return whole(_share(use, DECAYS))


def _faded(
    value: Float32[Array, " *at E d"], new: Float32[Array, " *at E"], decays: tuple[float, ...]
) -> Float32[Array, " *at E d"]:
    return faded(value, new[..., None], _of_each(decays, value))


def faded(
    value: Float32[Array, " *#n"], new: Float32[Array, " *#n"], decay: Float32[Array, " *#n"]
) -> Float32[Array, "..."]:
    """Gives a fading sum after one more visit that adds `new`."""
    # (value + new) * decay cannot be contracted to a fused multiply-add, which rounds differently
    value = (value + new) * decay
    return jnp.where(value < np.finfo(np.float32).tiny, 0.0, value)


def features(row: History) -> Int32[Array, " *at E f"]:
    """Gives the f = `FEATURES` integers of 0..255 that a predictor sees.

    The shares of use linearly (256ths) and their logarithms (32nds of an octave above 2^-8), the shares of gate mass,
    the gate mass of the latest visit, and the logarithms of age, gap and visits so far.
    """
    use, mass = _share(row.use, DECAYS), _share(row.mass, MASS_DECAYS)
    counts = jnp.stack([row.age, row.gap, row.seen], axis=-1)
    return jnp.concatenate(
        [
            whole(use),
            log2(use * 256.0),
            whole(mass),
            whole(row.last)[..., None],
            log2((counts + 1).astype(jnp.float32)),
        ],
        axis=-1,
    )


def wave(last: Float32[Array, " *n L E"]) -> Float32[Array, " *n L*E"]:
    """Integers of 0..32: the latest demand of every layer, each use 16 and up to 16 for its gate.

    At layer l these are the uses of this token in the layers up to l and of the token before in the others.
    """
    level = jnp.where(last > 0, 16.0 + jnp.minimum(jnp.floor(last * 16.0), 16.0), 0.0)
    return level.reshape(*last.shape[:-2], -1)


def topic(use: Float32[Array, " *n L E 7"]) -> Float32[Array, " *n L*E"]:
    """Integers of 0..255: what the request is about, the slow shares of use of every layer.

    From ``History.use``; in 256ths, which a predictor reads as 64ths.
    """
    slow = use[..., TOPIC] * jnp.float32(share_of(DECAYS[TOPIC]))
    share = whole(slow).astype(jnp.float32)
    return share.reshape(*share.shape[:-2], -1)


def _share(value: Float32[Array, " *at E d"], decays: tuple[float, ...]) -> Float32[Array, " *at E d"]:
    return value * _of_each([share_of(d) for d in decays], value)


def share_of(decay: float) -> float:
    """Gives what makes a share of the layer's visits of a fading sum."""
    return (1 - decay) / decay


def _of_each(numbers: Sequence[float], value: Float32[Array, " *at d"]) -> Float32[Array, " *ones d"]:
    """Gives numbers along the last axis of `value`."""
    return jnp.asarray(numbers, jnp.float32).reshape((1,) * (value.ndim - 1) + (-1,))


def whole(share: Float32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives a share as an integer of 0..255."""
    return jnp.clip(jnp.floor(share * 256.0), 0, TOP).astype(jnp.int32)


def log2(value: Float32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives 32 log2(value) of 1..256, linear within an octave: read off the bits of the float32."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.clip((bits >> 18) - (127 << 5), 0, TOP)
