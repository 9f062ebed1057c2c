"""A trained predictor inside the scan: integer weights, exact in float32, so that every device gives the same scores.

The predictor has two parts. `free` sees the history of one expert and serves any model. `tied` adds the model's own
experts: the wavefront of latest demands, and the slower topic of the request, each through a few hidden numbers for the
target layer to a score for each of its experts. It serves the shape it was trained on. `learn.predictor` trains both.

Units: inputs 1/256 (wavefront 1/16, topic 1/64), weights 1/64, hidden numbers 1/64, scores 1/4096 of a logit.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float32, Int32

from specmd_jax.archives import arrays_of
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import use_history as history
from specmd_jax.policies.use_history import History

EXACT = 1 << 24  # integers up to here are exact in float32
ONE = 4096  # score units of a logit
SURE = EXACT  # above every score
MOST_HIDDEN = 1023
HEADS = ("evictor", "prefetcher")
DATA = Path(__file__).resolve().parent / "data"


class Free(NamedTuple):
    """Histories of single experts: [F] -> J hidden -> a score."""

    hidden: npt.NDArray[np.int16]  # [F, J]
    hidden_bias: npt.NDArray[np.int32]  # [J]
    out: npt.NDArray[np.int16]  # [J]
    bias: npt.NDArray[np.int32]  # []


class Context(NamedTuple):
    """All layers at once: [L * E] -> D hidden per target layer -> a score for each of its experts."""

    into: npt.NDArray[np.int8]  # [L, L * E, D], or [1, L * E, D] shared by the target layers
    bias: npt.NDArray[np.int32]  # [L, D]
    out: npt.NDArray[np.int8]  # [L, E, D]


class Tied(NamedTuple):
    """What only a model of L layers with E experts can use."""

    free: Free
    bias: npt.NDArray[np.int32]  # [L, E]
    wave: Context
    topic: Context


class Weights(NamedTuple):
    """A trained predictor."""

    free: Free
    tied: Tied


def scores(weights: Weights, memory: History, targets: Int32[Array, " targets"]) -> Int32[Array, "targets E"]:
    """Gives scores (4096ths of a logit) of the experts of the target layers, from tables of all layers."""
    layers, experts = memory.age.shape
    rows = jax.tree.map(lambda table: table[targets], memory)
    seen = history.features(rows).astype(jnp.float32)  # [T, E, F]
    if weights.tied.bias.shape != (layers, experts):
        found = _free(weights.free, seen)
    else:
        tied = weights.tied
        found = _free(tied.free, seen) + jnp.asarray(tied.bias, jnp.float32)[targets]
        found += _context(tied.wave, history.wave(memory.last), targets, 2**-4)
        found += _context(tied.topic, history.topic(memory.use), targets, 2**-6)
    return found.astype(jnp.int32)


def _free(weights: Free, seen: Float32[Array, "targets E f"]) -> Float32[Array, "targets E"]:
    hidden = _dot(seen, weights.hidden) + jnp.asarray(weights.hidden_bias, jnp.float32)[None, None]
    return _dot(_active(hidden, 2**-8), weights.out) + jnp.asarray(weights.bias, jnp.float32)


def _context(
    weights: Context, inputs: Float32[Array, " experts"], targets: Int32[Array, " targets"], scale: float
) -> Float32[Array, "targets E"]:
    into = jnp.asarray(weights.into)[targets if len(weights.into) > 1 else jnp.zeros_like(targets)]  # [T, L * E, D]
    bias = jnp.asarray(weights.bias, jnp.float32)[targets]
    hidden = jax.vmap(lambda matrix: _dot(inputs, matrix))(into) + bias
    return jax.vmap(_dot)(jnp.asarray(weights.out)[targets], _active(hidden, scale))


def _active(hidden: Float32[Array, " *n"], scale: float) -> Float32[Array, " *n"]:
    """Gives the sums of products as hidden numbers: no sign, whole 64ths, at most 16."""
    return jnp.clip(jnp.floor(hidden * scale), 0, MOST_HIDDEN)


def _dot(left: jax.Array, right: jax.Array | npt.NDArray[np.generic]) -> jax.Array:
    # highest precision: devices that round the factors of a float32 product would lose bits
    right = jnp.asarray(right).astype(jnp.float32)
    return jnp.dot(left.astype(jnp.float32), right, precision=jax.lax.Precision.HIGHEST)


def odds(scores: Int32[Array, " *n"]) -> Float32[Array, " *n"]:
    """Gives scores as float32 above 0, 2 to the logit (linear within an octave): what a prefetch selection compares."""
    bits = (127 << 23) + (jnp.clip(scores, -16 * ONE, 16 * ONE) << 11)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def load(head: str, checkpoint: str = "") -> Weights:
    """Loads the predictor in `checkpoint`, an npz that `learn.training` exported; "" is the package's own.

    Raises SpecmdError if there is none, or if it is one for the other head.
    """
    path = Path(checkpoint) if checkpoint else DATA / f"{head}.npz"
    try:
        return _read(head, str(path), path.stat().st_mtime_ns)
    except OSError as error:
        raise SpecmdError(f"checkpoint {path}: {error.strerror or error}") from None


@functools.lru_cache(maxsize=16)
def _read(head: str, path: str, changed_ns: int) -> Weights:
    del changed_ns  # a file that is written again is read again
    arrays = arrays_of(path, "an npz of a trained predictor")
    kind = str(arrays.pop("head", ""))
    if kind not in HEADS:
        raise SpecmdError(f"checkpoint {path}: expected an npz of a trained predictor, found no array 'head' in it")
    if kind != head:
        raise SpecmdError(f"checkpoint {path}: expected weights of the {head}, found those of the {kind}")
    return checked(unflatten(arrays, path), path)


def flatten(weights: Weights) -> dict[str, npt.NDArray[np.generic]]:
    """Gives arrays by name, as they are stored: "free/out", "tied/wave/into" and so on."""
    found: dict[str, npt.NDArray[np.generic]] = {}

    def walk(node: object, prefix: str) -> None:
        for name, child in zip(type(node)._fields, node, strict=True):  # type: ignore[attr-defined, arg-type]
            if isinstance(child, tuple):
                walk(child, f"{prefix}{name}/")
            else:
                found[f"{prefix}{name}"] = np.asarray(child)

    walk(weights, "")
    return found


def unflatten(arrays: dict[str, npt.NDArray[np.generic]], path: str) -> Weights:
    """Gives the inverse of `flatten`; `path` is named in the SpecmdError when an array is missing."""

    def part(kind: type, prefix: str, **inner: object) -> object:
        fields = {}
        for name in kind._fields:  # type: ignore[attr-defined]
            if name in inner:
                fields[name] = inner[name]
            elif prefix + name in arrays:
                fields[name] = arrays[prefix + name]
            else:
                raise SpecmdError(f"checkpoint {path}: no array {prefix + name!r}")
        return kind(**fields)

    tied = part(
        Tied,
        "tied/",
        free=part(Free, "tied/free/"),
        wave=part(Context, "tied/wave/"),
        topic=part(Context, "tied/topic/"),
    )
    return Weights(part(Free, "free/"), tied)  # type: ignore[arg-type]


def checked(weights: Weights, path: str) -> Weights:
    """`weights`, or a SpecmdError: shapes that do not fit, no integers, or sums that could leave the exact integers."""

    def fits(name: str, array: npt.NDArray[np.generic] | np.generic, *shape: int) -> None:
        if array.dtype.kind != "i" or array.shape != shape:
            raise SpecmdError(
                f"checkpoint {path}: {name} is {array.dtype} {array.shape}, expected integers of shape {shape}"
            )

    def reach(inputs: int, into: npt.NDArray[np.generic], bias: npt.NDArray[np.generic], name: str) -> None:
        most = inputs * np.abs(into.astype(np.int64)).sum(axis=-2).max() + np.abs(bias.astype(np.int64)).max()
        if most >= EXACT:
            raise SpecmdError(f"checkpoint {path}: {name} can sum to {most}, expected less than {EXACT}")

    tied = weights.tied
    if tied.bias.ndim != 2:
        raise SpecmdError(f"checkpoint {path}: tied/bias has {tied.bias.ndim} dimensions, expected layers and experts")
    layers, experts = tied.bias.shape
    fits("tied/bias", tied.bias, layers, experts)
    score_reach = np.abs(tied.bias.astype(np.int64)).max(initial=0)
    for name, free in (("free", weights.free), ("tied/free", tied.free)):
        width = free.out.shape[0] if free.out.ndim else 0
        fits(f"{name}/hidden", free.hidden, history.FEATURES, width)
        fits(f"{name}/hidden_bias", free.hidden_bias, width)
        fits(f"{name}/out", free.out, width)
        fits(f"{name}/bias", free.bias)
        reach(history.TOP, free.hidden, free.hidden_bias, f"{name}/hidden")
    score_reach += MOST_HIDDEN * np.abs(tied.free.out.astype(np.int64)).sum() + abs(int(tied.free.bias))
    for name, context, top in (("wave", tied.wave, history.TOP_WAVE), ("topic", tied.topic, history.TOP)):
        width = context.bias.shape[-1] if context.bias.ndim else 0
        shared = 1 if len(context.into) == 1 else layers
        fits(f"tied/{name}/into", context.into, shared, layers * experts, width)
        fits(f"tied/{name}/bias", context.bias, layers, width)
        fits(f"tied/{name}/out", context.out, layers, experts, width)
        reach(top, context.into, context.bias, f"tied/{name}/into")
        score_reach += MOST_HIDDEN * np.abs(context.out.astype(np.int64)).sum(axis=-1).max()
    if score_reach >= EXACT:
        raise SpecmdError(f"checkpoint {path}: scores can sum to {score_reach}, expected less than {EXACT}")
    return weights
