"""Attention of one new token over a KV cache, in one launch; the cache is written in place.

A program has one query head, or a share of the earlier positions of one: then the last program of a head to finish adds
the shares, in their order, so that the result does not depend on who that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.loops import next_power_of_two
from specmd_jax.moe.kernels.rows import lanes, load, place, stacked, statistics, store
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params
from specmd_jax.moe.model.layers import LayerCache
from specmd_jax.moe.model.rope import frequencies

LOWEST = -1e30  # below every score; finite, so that differences are numbers


@dataclass(frozen=True)
class Share:
    """How the positions are dealt: ``splits`` programs a head, each with ``block`` positions a step (powers of two)."""

    splits: int = 1
    block: int = 64
    num_warps: int = 4
    num_stages: int = 1


def choose_share(positions: int) -> Share:
    """Gives the default for a cache of so many positions: one program for each 1,024, up to 16."""
    return Share(min(next_power_of_two(-(-positions // 1024)), 16))


class _Given(NamedTuple):
    query: Any  # [1, heads * head_dim]
    key: Any  # [1, kv_heads * head_dim]
    value: Any
    query_norm: Any  # weight [L, heads * head_dim] or [L, head_dim]; None
    key_norm: Any
    sinks: Any  # [L, heads]; None
    radians: Any  # [1, head_dim / 2] a position
    start: Any  # [1]: positions in the cache
    index: Any


class _Made(NamedTuple):
    keys: Any  # [L, S, kv_heads * head_dim]
    values: Any
    out: Any  # [1, heads * head_dim]
    # what programs of a head leave for the last of them
    counters: Any = None  # [heads] int32: how many are done
    peaks: Any = None  # [heads, splits] float32
    weights: Any = None  # [heads, splits]
    sums: Any = None  # [heads, splits, 2, P]


class _Sum(NamedTuple):
    """A weighted sum of values, as the halves of a head: weights are exp(score - peak)."""

    peak: jax.Array  # [] or [block] float32
    weight: jax.Array
    low: jax.Array  # [P] or [block, P]
    high: jax.Array


def attention(
    cfg: MoEConfig,
    window: int,
    params: Params,
    projected: tuple[jax.Array, jax.Array, jax.Array],
    cache: LayerCache,
    start: jax.Array,
    *,
    counters: jax.Array | None = None,
    index: jax.Array | None = None,
    share: Share | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, LayerCache]:
    """Norms, turns and caches the new key, and attends: [1, heads * head_dim] before the output projection.

    Args:
        params: of `Attention`: norms and sinks are used, projections are not.
        projected: query [1, heads * head_dim], key and value [1, kv_heads * head_dim].
        cache: [1, S, kv_heads, head_dim] each; with ``index`` [L, 1, S, kv_heads, head_dim].
        start: [1] int32, the positions already in the cache, below S.
        counters: [heads or more] int32 zeros, if ``share`` has several splits; None: they are made.
        index: [1] int32; then parameters and cache have a leading axis of layers, and this is the layer.
    """
    shape, positions = cache.key.shape, cache.key.shape[-3]
    share = share or choose_share(positions)
    flat = [a.reshape(-1, positions, cfg.kv_heads * cfg.head_dim) for a in cache]
    radians, rope_scale = frequencies(cfg.rope, positions)
    query_norm, key_norm = (
        stacked(params[name], index) if cfg.qk_norm != "none" else None for name in ("query_norm", "key_norm")
    )
    sinks = stacked(params["sinks"], index) if cfg.sinks else None
    given = _Given(*projected, query_norm, key_norm, sinks, jnp.asarray(radians)[None], start, index)
    several = share.splits > 1
    if several and counters is None:
        counters = jnp.zeros(cfg.heads, jnp.int32)
    written = [*flat, counters] if several else flat
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*flat, projected[0])]
    if counters is not None and several:
        shapes.append(jax.ShapeDtypeStruct(counters.shape, jnp.int32))
        parts = (cfg.heads, share.splits), (cfg.heads, share.splits, 2, next_power_of_two(cfg.head_dim // 2))
        shapes += [jax.ShapeDtypeStruct(parts[n], jnp.float32) for n in (0, 0, 1)]

    def attend_head(given: _Given, written: Any, made: _Made) -> None:
        del written  # the same memory as the first of `made`
        Head(cfg, window, share, rope_scale, given, made, interpret).run()

    before = len(jax.tree.leaves(given))
    made = pl.pallas_call(
        attend_head,
        grid=(cfg.heads, share.splits),
        out_shape=(_Made(*shapes),),
        input_output_aliases={before: 0, before + 1: 1} | ({before + 2: 3} if several else {}),
        compiler_params=triton.CompilerParams(num_warps=share.num_warps, num_stages=share.num_stages),
        interpret=interpret,
        name="attend_head",
    )(given, written)[0]
    return made.out, LayerCache(made.keys.reshape(shape), made.values.reshape(shape))


class Head:
    """One program: a head, kept as two halves, which are the entries that the rotation pairs."""

    def __init__(
        self, cfg: MoEConfig, window: int, share: Share, rope_scale: float, given: _Given, made: _Made, interpret: bool
    ) -> None:
        self.cfg, self.window, self.share, self.rope_scale = cfg, window, share, rope_scale
        self.given, self.made, self.interpret = given, made, interpret
        self.head, self.split = pl.program_id(0), pl.program_id(1)
        self.group = self.head // (cfg.heads // cfg.kv_heads)
        self.at, self.start = place(given.index), given.start[0]
        self.lane, self.mask = lanes(cfg.head_dim // 2)
        turn = cfg.rope.interleaved
        self.halves = (2 * self.lane, 2 * self.lane + 1) if turn else (self.lane, self.lane + cfg.head_dim // 2)

    def run(self) -> None:
        """Writes the new key and value, and the head's output or its share of it."""
        cfg, given, made = self.cfg, self.given, self.made
        query = self._turned(given.query, given.query_norm, self.head)
        key = self._turned(given.key, given.key_norm, self.group)
        value = [self._clip(load(given.value, (0, at), self.mask)) for at in self._of(self.group)]

        @pl.when((self.head % (cfg.heads // cfg.kv_heads) == 0) & (self.split == 0))
        def _() -> None:
            for cache, halves in ((made.keys, key), (made.values, value)):
                for where, half in zip(self._of(self.group), halves, strict=True):
                    store(cache, (self.at, self.start, where), half, self.mask)

        own = jnp.sum(query[0] * key[0] + query[1] * key[1]) * cfg.attention_scale
        earlier = self._earlier(query)
        if self.share.splits == 1:
            self._finish(earlier, own, value)
            return
        self._keep(earlier)
        # what this program wrote is there for whoever sees that it is done
        self._barrier()
        one = self.split * 0 + 1  # an interpreted kernel takes no plain number, and a choice of 0 and 1 becomes a bit
        done = triton.atomic_add(made.counters, (self.head,), one)

        @pl.when(done == self.share.splits - 1)
        def _() -> None:
            self._barrier()
            self._finish(self._gathered(), own, value)

    def _barrier(self) -> None:
        """Lets all threads see what each has written."""
        if not self.interpret:
            triton.debug_barrier()

    def _of(self, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives the places of a head's halves in a row of heads."""
        return head * self.cfg.head_dim + self.halves[0], head * self.cfg.head_dim + self.halves[1]

    def _clip(self, row: jax.Array) -> jax.Array:
        limit = self.cfg.qkv_clip
        return jnp.clip(row, -limit, limit) if limit else row

    def _turned(self, row_ref: Any, norm: Params | None, head: jax.Array) -> list[jax.Array]:
        """Gives a head of the query or key behind its norm, clipped and turned to its position, as `Attention` does."""
        cfg, dtype, at = self.cfg, row_ref.dtype, self._of(head)
        low, high = (load(row_ref, (0, where), self.mask) for where in at)
        if cfg.qk_norm == "full":
            assert norm is not None
            _, scale = statistics(row_ref, cfg.norm_eps, False)
            low, high = self._weighed(low * scale, high * scale, norm, at, dtype)
        low, high = self._clip(low), self._clip(high)
        if cfg.qk_norm == "head":
            assert norm is not None
            scale = lax.rsqrt(jnp.sum(low * low + high * high) / cfg.head_dim + cfg.norm_eps)
            low, high = self._weighed(low * scale, high * scale, norm, self.halves, dtype)
        angle = self.start.astype(jnp.float32) * load(self.given.radians, (0, self.lane), self.mask)
        cos, sin = jnp.cos(angle) * self.rope_scale, jnp.sin(angle) * self.rope_scale
        turned = low * cos - high * sin, high * cos + low * sin
        return [half.astype(dtype).astype(jnp.float32) for half in turned]

    def _weighed(self, low: Any, high: Any, norm: Params, at: tuple[jax.Array, jax.Array], dtype: Any) -> Any:
        weights = (load(norm["weight"], (self.at, where), self.mask) for where in at)
        pairs = zip((low, high), weights, strict=True)
        return [(half * weight).astype(dtype).astype(jnp.float32) for half, weight in pairs]

    def _earlier(self, query: list[jax.Array]) -> _Sum:
        """Gives the weighted sum over this program's share of the cached positions before the new one.

        Each place in a block keeps a sum of its own, so that a step needs nothing from other threads but the products.
        """
        cfg, block, start = self.cfg, self.share.block, self.start
        first = jnp.maximum(start - (self.window - 1), 0) if self.window else jnp.int32(0)
        blocks = (start - first + block - 1) // block
        each = (blocks + self.share.splits - 1) // self.share.splits
        begin = self.split * each
        shape = block, self.lane.shape[0]
        columns = [jnp.broadcast_to(where[None, :], shape) for where in self._of(self.group)]
        offset = jnp.arange(block, dtype=jnp.int32)

        def step(number: jax.Array, total: _Sum) -> _Sum:
            position = first + number * block + offset
            seen = position < start
            rows, mask = jnp.broadcast_to(position[:, None], shape), jnp.broadcast_to(seen[:, None], shape)
            if self.mask is not None:
                mask &= self.mask[None, :]
            key = [load(self.made.keys, (self.at, rows, column), mask) for column in columns]
            value = [load(self.made.values, (self.at, rows, column), mask) for column in columns]
            score = jnp.sum(key[0] * query[0][None, :] + key[1] * query[1][None, :], axis=1) * cfg.attention_scale
            peak = jnp.maximum(total.peak, jnp.where(seen, score, LOWEST))
            fade, weight = jnp.exp(total.peak - peak), jnp.where(seen, jnp.exp(score - peak), 0.0)
            low, high = (
                old * fade[:, None] + weight[:, None] * new
                for old, new in zip((total.low, total.high), value, strict=True)
            )
            return _Sum(peak, total.weight * fade + weight, low, high)

        zero = jnp.zeros(shape, jnp.float32)
        nothing = _Sum(jnp.full(block, LOWEST, jnp.float32), jnp.zeros(block, jnp.float32), zero, zero)
        return _joined(lax.fori_loop(begin, jnp.minimum(begin + each, blocks), step, nothing))

    def _keep(self, total: _Sum) -> None:
        """Writes this program's share."""
        made, at = self.made, (self.head, self.split)
        made.peaks[at], made.weights[at] = total.peak, total.weight
        made.sums[(*at, 0, self.lane)], made.sums[(*at, 1, self.lane)] = total.low, total.high

    def _gathered(self) -> _Sum:
        """Gives the sum of all programs of the head."""
        made, shape = self.made, (self.share.splits, self.lane.shape[0])
        split = jnp.arange(self.share.splits, dtype=jnp.int32)
        rows, lane = jnp.broadcast_to(split[:, None], shape), jnp.broadcast_to(self.lane[None, :], shape)
        low, high = (made.sums[self.head, rows, half, lane] for half in (0, 1))
        return _joined(_Sum(made.peaks[self.head, split], made.weights[self.head, split], low, high))

    def _finish(self, total: _Sum, own: jax.Array, value: list[jax.Array]) -> None:
        """Adds the new position, whose score is ``own``, and the sink; writes the output."""
        sinks, peak = self.given.sinks, jnp.maximum(total.peak, own)
        sink = None if sinks is None else sinks[self.at, self.head].astype(jnp.float32)
        if sink is not None:
            peak = jnp.maximum(peak, sink)
        fade, new = jnp.exp(total.peak - peak), jnp.exp(own - peak)
        weight = total.weight * fade + new
        if sink is not None:
            weight = weight + jnp.exp(sink - peak)
        for where, sums, half in zip(self._of(self.head), (total.low, total.high), value, strict=True):
            store(self.made.out, (0, where), (sums * fade + half * new) / weight, self.mask)


def _joined(parts: _Sum) -> _Sum:
    """Adds the sums [n, ...] of several places."""
    peak = jnp.max(parts.peak)
    fade = jnp.exp(parts.peak - peak)
    low, high = (jnp.sum(half * fade[:, None], axis=0) for half in (parts.low, parts.high))
    return _Sum(peak, jnp.sum(parts.weight * fade), low, high)
