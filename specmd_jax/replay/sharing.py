"""Link and host on one memory, moment by moment, where their pieces may have to wait for reads (CONTRACT.md section 6).

Where nothing waits, `timing.HostWork` says the same in closed form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.loops import anywhere
from specmd_jax.replay.timing import TINY, sums_of


class Line(NamedTuple):
    """What one of them does, one after the other. Seconds are from the gate."""

    there: Bool[Array, " n"]  # the others are no pieces at all
    ready_s: Float32[Array, " n"]  # not before that
    work_s: Float32[Array, " n"]  # undisturbed


class Ends(NamedTuple):
    """When it is done."""

    link_s: Float32[Array, " n"]  # of each piece; 0: there is none
    host_s: Float32[Array, " n"]
    busy_s: Float32[Array, " 2"]  # that link and host work, slowed down or not


class HostTimes(NamedTuple):
    """When the host works, piece by piece, and what that leaves of the link's rate to prefetch copies."""

    begin_s: Float32[Array, " n"]  # in their order
    end_s: Float32[Array, " n"]
    left: Float32[Array, ""]

    def copied_s(self, begin_s: Float32[Array, ""], copy_s: Float32[Array, ""]) -> Float32[Array, ""]:
        """When a prefetch copy that begins then has been copied; no demand copy is under way."""
        sums = sums_of(self.begin_s.shape[0])
        from_s = jnp.maximum(self.begin_s, begin_s)
        long_s = jnp.maximum(self.end_s - from_s, 0.0)
        by_then_s = (from_s - begin_s) - (1.0 - self.left) * (sums(long_s) - long_s)  # copied before the piece begins
        slower = (1.0 - self.left) / jnp.maximum(self.left, TINY)
        lost_s = jnp.clip((copy_s - by_then_s) * slower, 0.0, (1.0 - self.left) * long_s)
        return begin_s + copy_s + jnp.sum(lost_s)


class _Under(NamedTuple):
    """What is under way, of link and host."""

    now_s: Float32[Array, ""]
    piece: Int32[Array, " 2"]
    left_s: Float32[Array, " 2"]  # of its work
    ends_s: Float32[Array, "2 n"]
    busy_s: Float32[Array, " 2"]


def side_by_side(link: Line, host: Line, slow: Float32[Array, ""], needed: Bool[Array, ""]) -> Ends:
    """Lets link and host work: the link in the order of its pieces, the host in the order in which they are ready.

    While both work, both take (1 + `slow`) times as long.

    Args:
      needed: whether anybody reads the result; if not, nothing is worked out.
    """
    pieces = link.there.shape[0]
    first = jnp.arange(pieces, dtype=jnp.float32)
    keys = jnp.stack([jnp.where(link.there, first, jnp.inf), jnp.where(host.there, host.ready_s, jnp.inf)])
    order = jnp.argsort(keys, axis=1, stable=True).astype(jnp.int32)
    ready_s = jnp.take_along_axis(jnp.stack([link.ready_s, host.ready_s]), order, axis=1)
    work_s = jnp.take_along_axis(jnp.stack([link.work_s, host.work_s]), order, axis=1)
    count = jnp.where(needed, jnp.sum(jnp.stack([link.there, host.there]), axis=1, dtype=jnp.int32), 0)

    def of(rows: Float32[Array, "2 n"], piece: Int32[Array, " 2"]) -> Float32[Array, " 2"]:
        return jnp.take_along_axis(rows, jnp.minimum(piece, pieces - 1)[:, None], axis=1)[:, 0]

    def go_on(under: _Under) -> _Under:
        there, ready = under.piece < count, of(ready_s, under.piece)
        works = there & (ready <= under.now_s)
        stretch = jnp.where(jnp.all(works), 1.0 + slow, 1.0)
        until_s = jnp.where(works, under.now_s + under.left_s * stretch, jnp.where(there, ready, jnp.inf))
        then_s = jnp.where(jnp.any(there), jnp.min(until_s), under.now_s)
        over, took_s = works & (until_s <= then_s), then_s - under.now_s
        left_s = jnp.where(works, jnp.maximum(under.left_s - took_s / stretch, 0.0), under.left_s)
        place = jnp.where(over, under.piece, pieces)
        return _Under(
            now_s=then_s,
            piece=under.piece + over.astype(jnp.int32),
            left_s=jnp.where(over, of(work_s, under.piece + 1), left_s),
            ends_s=under.ends_s.at[jnp.arange(2), place].set(then_s, mode="drop"),
            busy_s=under.busy_s + jnp.where(works, took_s, 0.0),
        )

    def on(under: _Under) -> Any:
        return anywhere(jnp.any(under.piece < count))

    zero = jnp.zeros(2, jnp.float32)
    nothing = _Under(jnp.float32(0), jnp.zeros(2, jnp.int32), work_s[:, 0], jnp.zeros_like(work_s), zero)
    under = jax.lax.while_loop(on, go_on, nothing)
    back = jnp.argsort(order, axis=1)
    ends_s = jnp.take_along_axis(under.ends_s, back, axis=1)
    return Ends(ends_s[0], ends_s[1], under.busy_s)
