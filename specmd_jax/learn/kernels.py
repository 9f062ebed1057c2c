"""The compiled loops of training on a host: a predictor's scores, their slopes, an update.

`predictor.Predictor` says what is computed; here the same is done in one pass per target layer that stays in the
processor's cache, and a wavefront is the list of its few uses. Every loop takes a range of layers, tokens or weights.
Ranges write nothing in common, so that threads may share them out in any way, with the same bits.

Letters: N tokens of a window, B tokens of a batch, L layers, E experts, F features, D and S hidden numbers of wavefront
and topic, J of histories, K most uses of a token, M rows (tokens x experts) that are worked on at once.

Kernels that call each other live in this one file because the compile cache notices changes of a function's own file
only; `history_kernels` writes what a predictor sees.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specmd_jax.loops import compiled

F32 = np.float32
ZERO, ONE = F32(0), F32(1)
SMALL, SIXTY_FOUR = F32(1e-8), F32(64)
NEAREST = F32(3 << 22)  # added and taken away, it leaves the nearest whole number, of two the even one
ROWS = 128  # tokens x experts at once: their histories and hidden numbers stay in the first-level cache
LOOSE = {"contract", "reassoc", "nsz"}  # sums in any order: the same one on every run of a machine


def _loose(function: Any) -> Any:
    return compiled(function, fastmath=LOOSE, error_model="numpy")


def _exact(function: Any) -> Any:
    return compiled(function, fastmath={"contract"}, error_model="numpy")


@compiled
def list_uses(
    first: Any, last: Any, tokens: Any, wave: Any, keep: Any, scale: Any, at: Any, level: Any, to: Any
) -> None:
    """Lists the uses of the wavefronts of tokens ``first`` up to ``last`` of a batch.

    Args:
      first: place in the batch.
      last: the one behind the last place.
      tokens: int64 [B, 2] in the window: the token and the one before, -1 for none.
      wave: uint8 [N, L, E].
      keep: bool [B, 2, K], False where training hides an input.
      scale: float32, of a level.
      at: int32 [B, 2, K], written: flat ids.
      level: float32 [B, 2, K], written.
      to: int32 [B, 2, L + 1], written: where the uses of a layer begin.
    """
    _, layers, experts = wave.shape
    for b in range(first, last):
        for side in range(2):
            n, count, nth = tokens[b, side], 0, 0
            for layer in range(layers):
                to[b, side, layer] = count
                if n < 0:
                    continue
                for e in range(experts):
                    if wave[n, layer, e] > 0:
                        if keep[b, side, nth]:
                            at[b, side, count] = layer * experts + e
                            level[b, side, count] = F32(wave[n, layer, e]) * scale
                            count += 1
                        nth += 1
            to[b, side, layers] = count


@_loose
def project(first: Any, last: Any, tokens: Any, topic: Any, matrix: Any, now: Any, before: Any) -> None:
    """Writes ``now`` and ``before`` float32 [L, B, S] of some layers: topics of two tokens times `matrix` [L, E, S]."""
    experts, width = matrix.shape[1:]
    for layer in range(first, last):
        for b in range(len(tokens)):
            for side in range(2):
                row = now[layer, b] if side == 0 else before[layer, b]
                row[:] = ZERO
                n = tokens[b, side]
                if n < 0:
                    continue
                for e in range(experts):
                    if topic[n, layer, e] > 0:
                        value = F32(topic[n, layer, e]) * F32(1 / 64)
                        for s in range(width):
                            row[s] += value * matrix[layer, e, s]


@_loose
def gather(first: Any, last: Any, place: Any, now: Any, before: Any, total: Any) -> None:
    """Puts into ``now`` [L, B, S] what each target layer sees of tokens ``first`` up to ``last``.

    That is the sum of ``now`` over the layers that the token has passed, and of ``before`` over the others. ``total``
    [S] is overwritten.
    """
    layers, _, width = now.shape
    for b in range(first, last):
        total[:] = ZERO
        for layer in range(layers):
            for s in range(width):
                total[s] += before[layer, b, s]
        for layer in range(layers):
            for s in range(width):
                moved = total[s] + (now[layer, b, s] - before[layer, b, s])
                now[layer, b, s] = moved if place == 1 else total[s]
                total[s] = moved


@_loose
def scatter(first: Any, last: Any, place: Any, now: Any, before: Any, total: Any, later: Any) -> None:
    """Gives the slope of `gather`: ``now`` has that of what each target sees, and gets its own; so does ``before``.

    ``total`` and ``later`` [S] are overwritten.
    """
    layers, _, width = now.shape
    for b in range(first, last):
        total[:] = ZERO
        later[:] = ZERO
        for layer in range(layers):
            for s in range(width):
                total[s] += now[layer, b, s]
        for layer in range(layers - 1, -1, -1):
            for s in range(width):
                own = later[s] + now[layer, b, s]
                mine = own if place == 1 else later[s]
                now[layer, b, s] = mine
                before[layer, b, s] = total[s] - mine
                later[s] = own


@_loose
def topic_slope(first: Any, last: Any, tokens: Any, topic: Any, now: Any, before: Any, slope: Any) -> None:
    """Adds to ``slope`` [L, E, S] of some layers what `project` owes to its matrix."""
    experts, width = slope.shape[1:]
    for layer in range(first, last):
        for b in range(len(tokens)):
            for side in range(2):
                n = tokens[b, side]
                if n < 0:
                    continue
                row = now[layer, b] if side == 0 else before[layer, b]
                for e in range(experts):
                    if topic[n, layer, e] > 0:
                        value = F32(topic[n, layer, e]) * F32(1 / 64)
                        for s in range(width):
                            slope[layer, e, s] += value * row[s]


@_loose
def _histories(x: Any, rows: Any, hidden: Any, bias: Any, out: Any, start: Any, active: Any, score: Any) -> None:
    """Adds the scores of histories ``x`` [F, M] to ``score`` [M]; ``active`` [J, M] keeps the hidden numbers."""
    features, width = hidden.shape
    for m in range(rows):
        score[m] += start
    for j in range(width):
        line, weight = active[j], out[j]
        for m in range(rows):
            line[m] = bias[j]
        f = 0
        while f + 10 <= features:  # ten products for each time that a sum is read and written
            a, b, c, d, e = hidden[f, j], hidden[f + 1, j], hidden[f + 2, j], hidden[f + 3, j], hidden[f + 4, j]
            g, h, i, k, n = hidden[f + 5, j], hidden[f + 6, j], hidden[f + 7, j], hidden[f + 8, j], hidden[f + 9, j]
            for m in range(rows):
                line[m] += (
                    a * x[f, m] + b * x[f + 1, m] + c * x[f + 2, m] + d * x[f + 3, m] + e * x[f + 4, m]
                    + g * x[f + 5, m] + h * x[f + 6, m] + i * x[f + 7, m] + k * x[f + 8, m] + n * x[f + 9, m]
                )  # fmt: skip
            f += 10
        while f < features:
            for m in range(rows):
                line[m] += hidden[f, j] * x[f, m]
            f += 1
        for m in range(rows):
            line[m] = max(line[m], ZERO)
            score[m] += weight * line[m]


@_loose
def _histories_slope(x: Any, rows: Any, owed: Any, out: Any, active: Any, slopes: Any, back: Any) -> None:
    """Adds to ``slopes`` [F * J + J + J + 1] (bias, hidden [F, J], hidden bias, out) what scores owe; ``back`` [M]."""
    features, width = len(x), len(out)
    for m in range(rows):
        slopes[0] += owed[m]
    for j in range(width):
        line, weight = active[j], out[j]
        total, through = ZERO, ZERO
        for m in range(rows):
            total += owed[m] * line[m]
            back[m] = owed[m] * weight if line[m] > ZERO else ZERO
            through += back[m]
        slopes[1 + features * width + j] += through
        slopes[1 + features * width + width + j] += total
        f = 0
        while f + 4 <= features:
            a, b, c, d = ZERO, ZERO, ZERO, ZERO
            for m in range(rows):
                a += back[m] * x[f, m]
                b += back[m] * x[f + 1, m]
                c += back[m] * x[f + 2, m]
                d += back[m] * x[f + 3, m]
            at = 1 + f * width + j
            slopes[at] += a
            slopes[at + width] += b
            slopes[at + 2 * width] += c
            slopes[at + 3 * width] += d
            f += 4
        while f < features:
            a = ZERO
            for m in range(rows):
                a += back[m] * x[f, m]
            slopes[1 + f * width + j] += a
            f += 1


@_loose
def _judge(rows: Any, score: Any, label: Any, share: Any, owed: Any) -> Any:
    """Writes the slope of the mean cross-entropy into ``owed`` [M] and gives the sum of the losses."""
    total = 0.0
    for m in range(rows):
        z = score[m]
        small = math.exp(-abs(z))
        odds = ONE / (ONE + small)
        owed[m] = ((odds if z > ZERO else ONE - odds) - label[m]) * share
        total += max(z, ZERO) - label[m] * z + math.log(ONE + small)
    return total


@_loose
def _add(some: Any, to: Any) -> None:
    for i in range(len(to)):
        to[i] += some[i]


@_loose
def _add_active(hidden: Any, out: Any, score: Any) -> None:
    """Adds ``hidden`` [D] times ``out`` [D, E] to ``score`` [E]; about half of the hidden numbers are 0."""
    experts = len(score)
    for d in range(len(hidden)):
        value = hidden[d]
        if value > ZERO:
            row = out[d]
            for e in range(experts):
                score[e] += value * row[e]


@_loose
def _active_slope(hidden: Any, out: Any, owed: Any, back: Any, slope: Any) -> None:
    """Gives the slope of `_add_active`: writes ``back`` [D], what the hidden numbers owe, and adds to ``slope``."""
    experts = len(owed)
    for d in range(len(hidden)):
        value, total = hidden[d], ZERO
        if value > ZERO:
            row, to = out[d], slope[d]
            for e in range(experts):
                total += owed[e] * row[e]
                to[e] += value * owed[e]
        back[d] = total


@_loose
def targets(
    first: Any, last: Any, place: Any, rest: Any, every: Any, lone_every: Any, train: Any,
    tokens: Any, histories: Any, seen: Any, blank: Any, code: Any, said: Any,
    at: Any, level: Any, to: Any, topics: Any,
    tied_bias: Any, tied: Any, free: Any, wave: Any, topic: Any,
    slope_bias: Any, slope_tied: Any, slope_free: Any, slope_wave: Any, slope_topic: Any,
    losses: Any, free_losses: Any, scratch: Any,
) -> None:  # fmt: skip
    """Scores the experts of target layers ``first`` up to ``last``; in training, adds the slopes of all weights.

    Args:
      first: layer.
      last: the one behind the last layer.
      place: 1 if a target's own layer is behind the present token (evictor), else 0.
      rest: place b of a batch is worked on at target t if ``(b + t) % every == rest``.
      every: 1: at all target layers.
      lone_every: in every how many groups of tokens the weights of histories learn.
      train: whether slopes are wanted.
      tokens: int64 [B, 2] in the window.
      histories: int64 [B] token whose histories are seen, -1: empty ones.
      seen: uint8 [N, L, F, E].
      blank: uint8 [F] of an empty history.
      code: uint16 [N, L, E], places in ``said``.
      said: float32 labels.
      at: of `list_uses`, as are ``level`` and ``to``.
      topics: float32 [L, B, S] of `gather`; in training it gets the slopes.
      tied_bias: float32 [L, E].
      tied: (hidden [F, J], its bias, out [J], bias [1]) of histories.
      free: the same, alone.
      wave: (into [L, L * E, D], bias [L, D], out [L, D, E]).
      topic: (bias [L, S], out [L, S, E]).
      slope_bias: like ``tied_bias``, added to.
      slope_tied: float32 [L, 1 + F * J + 2 * J], added to, as is ``slope_free``.
      slope_wave: like ``wave``, as ``slope_topic``.
      losses: float64 [L, B], written where worked on.
      free_losses: float64 [L, 2], added to: sum and number.
      scratch: arrays that are overwritten.
    """
    x, active, score, owed, back, label, h_wave, h_topic, d_wave, d_topic = scratch
    into, wave_bias, wave_out = wave
    topic_bias, topic_out = topic
    layers, width, experts = wave_out.shape
    slow = topic_out.shape[1]
    features = seen.shape[2]
    group = max(1, ROWS // experts)
    for t in range(first, last):
        start = (rest - t) % every
        count = (len(tokens) + every - 1 - start) // every
        share = ONE / F32(max(1, count * experts * layers))
        split = min(max(t + place, 0), layers)
        nth = 0
        for begin in range(0, count, group):
            held = min(group, count - begin)
            rows = held * experts
            for r in range(held):
                b = start + (begin + r) * every
                n, h = tokens[b, 0], histories[b]
                low = r * experts
                right = label[low : low + experts]
                for e in range(experts):
                    right[e] = said[code[n, t, e]]
                for f in range(features):
                    line = x[f, low : low + experts]
                    if h < 0:
                        line[:] = F32(blank[f]) * F32(1 / 256)
                    else:
                        known = seen[h, t, f]
                        for e in range(experts):
                            line[e] = F32(known[e]) * F32(1 / 256)
            score[:rows] = ZERO
            lone = (nth + t) % lone_every == 0
            if lone:
                _histories(x, rows, free[0], free[1], free[2], free[3][0], active, score)
                free_losses[t, 0] += _judge(rows, score, label, share * F32(lone_every), owed)
                free_losses[t, 1] += rows
                if train:
                    _histories_slope(x, rows, owed, free[2], active, slope_free[t], back)
                score[:rows] = ZERO
            nth += 1
            _histories(x, rows, tied[0], tied[1], tied[2], tied[3][0], active, score)
            for r in range(held):
                b = start + (begin + r) * every
                line = h_wave[r]
                for d in range(width):
                    line[d] = wave_bias[t, d]
                for side in range(2):
                    low = to[b, side, 0] if side == 0 else to[b, side, split]
                    high = to[b, side, split] if side == 0 else to[b, side, layers]
                    uses, levels, i = at[b, side], level[b, side], low
                    while i + 4 <= high:  # four products for each time that a sum is read and written
                        one, two, three, four = (
                            into[t, uses[i]],
                            into[t, uses[i + 1]],
                            into[t, uses[i + 2]],
                            into[t, uses[i + 3]],
                        )
                        u, v, w, z = levels[i], levels[i + 1], levels[i + 2], levels[i + 3]
                        for d in range(width):
                            line[d] += u * one[d] + v * two[d] + w * three[d] + z * four[d]
                        i += 4
                    while i < high:
                        one, u = into[t, uses[i]], levels[i]
                        for d in range(width):
                            line[d] += u * one[d]
                        i += 1
                mine, line_topic = score[r * experts : (r + 1) * experts], h_topic[r]
                _add(tied_bias[t], mine)
                for d in range(width):
                    line[d] = max(line[d], ZERO)
                for s in range(slow):
                    line_topic[s] = max(topics[t, b, s] + topic_bias[t, s], ZERO)
                _add_active(line, wave_out[t], mine)
                _add_active(line_topic, topic_out[t], mine)
            for r in range(held):
                low = r * experts
                losses[t, start + (begin + r) * every] = _judge(
                    experts, score[low : low + experts], label[low : low + experts], share, owed[low : low + experts]
                )
            if not train:
                continue
            for r in range(held):
                b = start + (begin + r) * every
                debts = owed[r * experts : (r + 1) * experts]
                _add(debts, slope_bias[t])
                _active_slope(h_wave[r], wave_out[t], debts, d_wave, slope_wave[2][t])
                _active_slope(h_topic[r], topic_out[t], debts, d_topic, slope_topic[1][t])
                _add(d_wave, slope_wave[1][t])
                _add(d_topic, slope_topic[0][t])
                for s in range(slow):
                    topics[t, b, s] = d_topic[s]
                for side in range(2):
                    low = to[b, side, 0] if side == 0 else to[b, side, split]
                    high = to[b, side, split] if side == 0 else to[b, side, layers]
                    for i in range(low, high):
                        target, value = slope_wave[0][t, at[b, side, i]], level[b, side, i]
                        for d in range(width):
                            target[d] += value * d_wave[d]
            if lone:
                for m in range(rows):
                    owed[m] *= F32(lone_every)
                _histories_slope(x, rows, owed, tied[2], active, slope_tied[t], back)
        if train and every > 1:
            for b in range(len(tokens)):
                if (b + t) % every != rest:
                    for s in range(slow):
                        topics[t, b, s] = ZERO


@_exact
def adamw(
    rate: Any, decay: Any, fade: Any, fade_squares: Any, lift: Any, lift_squares: Any, most: Any,
    weights: Any, stored: Any, slope: Any, mean: Any, squares: Any,
) -> None:  # fmt: skip
    """Moves some weights as optax's adamw does, and empties their slopes.

    ``stored`` gets them in whole 64ths of at most ``most``, or as they are where that is 0. ``lift`` and
    ``lift_squares`` undo that both means began at 0.
    """
    count = len(weights)
    for i in range(count):
        g = slope[i]
        m = fade * mean[i] + (ONE - fade) * g
        v = fade_squares * squares[i] + (ONE - fade_squares) * g * g
        mean[i] = m
        squares[i] = v
        weights[i] -= rate * (m * lift / (F32(math.sqrt(v * lift_squares)) + SMALL) + decay * weights[i])
        slope[i] = ZERO
    if most > ZERO:
        for i in range(count):
            within = min(max(weights[i] * SIXTY_FOUR, -most), most)
            stored[i] = ((within + NEAREST) - NEAREST) * F32(1 / 64)
    else:
        for i in range(count):
            stored[i] = weights[i]
