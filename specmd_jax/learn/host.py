"""Training on the host's processor, by compiled loops (`learn.kernels`): the network of `learn.predictor`, much faster.

Weights, and the means and squares of their slopes, are flat float32 vectors in the order of the network's parameters.
Slopes of a batch are those of `predictor.loss`, but for three things: a target layer learns from one in
`Settings.every` tokens of a batch, in turn; the weights of histories, a few hundred that see every expert of every
visit, learn from one in `LONE_EVERY` groups of tokens; and hidden inputs are other draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from specmd_jax.learn import kernels
from specmd_jax.learn.examples import Examples, Ids, blank, codes, values
from specmd_jax.learn.predictor import INT8, INT16, PLACES
from specmd_jax.learn.settings import Settings
from specmd_jax.learn.threads import over
from specmd_jax.policies import use_history as history

CONTEXTS = ("wave", "topic")
LONE_EVERY = 4
FADE, FADE_SQUARES = 0.9, 0.99
Floats = npt.NDArray[np.float32]


class HostState(NamedTuple):
    """What a run goes on from: the network and its optimizer. `Host.update` changes the vectors in place."""

    step: npt.NDArray[np.int64]  # updates so far, a scalar
    weights: Floats  # [P]
    mean: Floats  # [P] fading mean of the slopes
    squares: Floats  # [P] and of their squares


class Host:
    """The loops for a trace's shape, and the arrays that they work in."""

    def __init__(self, params: Any, settings: Settings, top_k: int, lone_every: int = LONE_EVERY) -> None:
        """Takes the first `params` of `Predictor` for the shape."""
        named, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self._turned = [path[0].key in CONTEXTS and path[-1].key == "out" for path, _ in named]
        leaves = [np.asarray(x, np.float32) for _, x in named]
        leaves = [np.swapaxes(x, 1, 2) if turned else x for x, turned in zip(leaves, self._turned, strict=True)]
        self._shapes = [leaf.shape for leaf in leaves]
        self._first = np.concatenate([np.ravel(leaf) for leaf in leaves])
        self._most = [_most(path) for path, _ in named]
        self._settings, self._top_k, self._lone_every = settings, top_k, lone_every
        self._said, self._blank = values(settings.head, settings.fade), blank()
        self._stored, self._slope = np.zeros_like(self._first), np.zeros_like(self._first)
        self._weights, self._slopes = self._views(self._stored), self._views(self._slope)
        self._shape = self._weights["tied_bias"].shape
        lone = 1 + (history.FEATURES + 2) * settings.hidden
        self._lone = {name: np.zeros((self._shape[0], lone), np.float32) for name in ("tied_free", "free")}
        self._arrays: dict[int, _Batch] = {}  # by the tokens of a batch
        self._codes: tuple[Examples, npt.NDArray[np.uint16]] | None = None  # of the window at hand
        self._held: Floats | None = None  # the weights that `_stored` has

    def start(self) -> HostState:
        """Gives the state before the first update."""
        zeros = np.zeros_like(self._first)
        return HostState(np.array(0), self._first.copy(), zeros, zeros.copy())

    def params(self, weights: Floats) -> Any:
        """Gives flat weights as parameters of `Predictor`."""
        parts = jax.tree.leaves(self._views(weights))
        turned = zip(parts, self._turned, strict=True)
        return jax.tree.unflatten(self._tree, [np.swapaxes(x, 1, 2) if turn else x for x, turn in turned])

    def _views(self, weights: Floats) -> Any:
        """Gives the parts of flat weights, those that lead out of hidden numbers by hidden number: [L, D, E]."""
        parts = np.split(weights, np.cumsum([math.prod(shape) for shape in self._shapes])[:-1])
        return jax.tree.unflatten(self._tree, [x.reshape(shape) for x, shape in zip(parts, self._shapes, strict=True)])

    def update(self, state: HostState, found: Examples, rows: Ids, rate: float) -> tuple[HostState, float]:
        """Learns some tokens [B] of a window at a learning rate; gives the new state, and the mean loss before."""
        step = int(state.step)
        loss = float(self._pass(state.weights, found, rows, step)[0].mean())
        lift = 1 / (1 - FADE ** (step + 1)), 1 / (1 - FADE_SQUARES ** (step + 1))
        numbers = [np.float32(x) for x in (rate, self._settings.weight_decay, FADE, FADE_SQUARES, *lift)]
        for begin, end, most in self._pieces():

            def move(first: int, last: int, begin: int = begin, most: int = most) -> None:
                arrays = (state.weights, self._stored, self._slope, state.mean, state.squares)
                kernels.adamw(*numbers, np.float32(most), *(x[begin + first : begin + last] for x in arrays))

            over(end - begin, move)
        return state._replace(step=np.array(step + 1)), loss

    def losses(self, weights: Floats, found: Examples, rows: Ids) -> tuple[npt.NDArray[np.float64], float]:
        """Gives the mean loss [B] of some tokens, and the mean of the score of lone histories over all of them."""
        return self._pass(weights, found, rows, None)

    def slopes(self, weights: Floats, found: Examples, rows: Ids, step: int = 0) -> Any:
        """Gives the slopes of the loss of some tokens, as parameters of `Predictor`."""
        self._pass(weights, found, rows, step)
        result = self.params(self._slope.copy())
        self._slope[:] = 0
        return result

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """Gives where parameters begin and end in the flat vector, and how many 64ths they have at most (0: any)."""
        first = 0
        for shape, most in zip(self._shapes, self._most, strict=True):
            last = first + math.prod(shape)
            yield first, last, most
            first = last

    def _pass(
        self, weights: Floats, found: Examples, rows: Ids, step: int | None
    ) -> tuple[npt.NDArray[np.float64], float]:
        """Gives `losses` of some tokens; with a `step`, which draws what is left out, `_slope` gets the slopes, too."""
        if self._held is not weights:
            for first, last, most in self._pieces():
                part = weights[first:last]
                self._stored[first:last] = np.clip(np.rint(part * 64), -most, most) / 64 if most else part
            self._held = weights
        train, settings = step is not None, self._settings
        (layers, experts), place, count = self._shape, PLACES[settings.head], len(rows)
        if count not in self._arrays:
            self._arrays[count] = _Batch(count, layers, experts, settings, self._top_k)
        at = self._arrays[count]
        every, lone_every = (settings.every, self._lone_every) if train else (1, 1)
        before = np.where(found.starts[rows], -1, rows - 1)
        tokens = np.stack([rows, before], axis=1)
        histories = before if settings.head == "prefetcher" else rows
        drop = np.float32(settings.drop if train else 0)
        if drop:
            draws = np.random.default_rng([settings.seed, step or 0]).random(at.keep.shape, np.float32)
            np.greater_equal(draws, drop, out=at.keep)
        else:
            at.keep[:] = True
        shape = (len(found.demand), layers, experts)
        wave, topic = found.wave.reshape(shape), found.topic.reshape(shape)

        def blank_topic() -> Floats:
            return np.zeros(settings.topics, np.float32)

        scale, own, slope, lone = np.float32(1 / (16 * (1 - drop))), self._weights, self._slopes, self._lone
        over(count, lambda a, b: kernels.list_uses(a, b, tokens, wave, at.keep, scale, at.ids, at.level, at.to))
        into = own["topic"]["into"].reshape(layers, experts, -1)
        over(layers, lambda a, b: kernels.project(a, b, tokens, topic, into, at.now, at.before))
        over(count, lambda a, b: kernels.gather(a, b, place, at.now, at.before, blank_topic()))
        if self._codes is None or self._codes[0] is not found:
            self._codes = found, codes(found, settings.head)
        code = self._codes[1]
        at.free[:] = 0
        at.losses[:] = 0

        def score(first: int, last: int) -> None:
            kernels.targets(
                first, last, place, (step or 0) % every, every, lone_every, train,
                tokens, histories, found.seen, self._blank, code, self._said, at.ids, at.level, at.to, at.now,
                own["tied_bias"], _lone(own["tied_free"]), _lone(own["free"]),
                tuple(own["wave"][name] for name in ("into", "bias", "out")),
                tuple(own["topic"][name] for name in ("bias", "out")),
                slope["tied_bias"], lone["tied_free"], lone["free"],
                tuple(slope["wave"][name] for name in ("into", "bias", "out")),
                tuple(slope["topic"][name] for name in ("bias", "out")),
                at.losses, at.free, _scratch(experts, settings),
            )  # fmt: skip

        over(layers, score)
        if train:
            over(count, lambda a, b: kernels.scatter(a, b, place, at.now, at.before, blank_topic(), blank_topic()))
            owed = slope["topic"]["into"].reshape(layers, experts, -1)
            over(layers, lambda a, b: kernels.topic_slope(a, b, tokens, topic, at.now, at.before, owed))
            for name, parts in lone.items():
                total, width = parts.sum(axis=0), settings.hidden
                parts[:] = 0
                bias, hidden, hidden_bias, out = np.split(total, np.cumsum([1, history.FEATURES * width, width]))
                slope[name]["bias"][()] = bias[0]
                slope[name]["hidden"][:] = hidden.reshape(-1, width)
                slope[name]["hidden_bias"][:] = hidden_bias
                slope[name]["out"][:] = out
        worked = np.maximum(1, np.count_nonzero(at.losses, axis=0))  # a loss is never 0
        free = at.free[:, 0].sum() / max(1.0, at.free[:, 1].sum())
        return at.losses.sum(axis=0) / (worked * experts), float(free)


class _Batch:
    """What is worked out for each token of a batch, and overwritten by the next."""

    def __init__(self, tokens: int, layers: int, experts: int, settings: Settings, top_k: int) -> None:
        uses = (tokens, 2, layers * top_k)
        self.keep, self.ids = np.ones(uses, np.bool_), np.zeros(uses, np.int32)
        self.level, self.to = np.zeros(uses, np.float32), np.zeros((tokens, 2, layers + 1), np.int32)
        topics = (layers, tokens, settings.topics)
        self.now, self.before = np.zeros(topics, np.float32), np.zeros(topics, np.float32)
        self.losses, self.free = np.zeros((layers, tokens)), np.zeros((layers, 2))


def _scratch(experts: int, settings: Settings) -> tuple[Floats, ...]:
    """Gives the arrays that one thread's `kernels.targets` overwrites."""
    tokens = max(1, kernels.ROWS // experts)
    rows = tokens * experts
    shapes: list[tuple[int, ...]] = [
        (history.FEATURES, rows),
        (settings.hidden, rows),
        (rows,),
        (rows,),
        (rows,),
        (rows,),
    ]
    shapes += [(tokens, settings.width), (tokens, settings.topics), (settings.width,), (settings.topics,)]
    return tuple(np.zeros(shape, np.float32) for shape in shapes)


def _lone(part: Any) -> tuple[Floats, ...]:
    """Gives the weights of `predictor.FreeScore` as the loops take them."""
    return part["hidden"], part["hidden_bias"], part["out"], part["bias"].reshape(1)


def _most(path: tuple[Any, ...]) -> int:
    """Gives how many 64ths a parameter has at most when it is stored, 0 for one that training does not round."""
    part, name = path[0].key, path[-1].key
    if name not in ("into", "out", "hidden"):
        return 0
    return INT8 if part in CONTEXTS else INT16
