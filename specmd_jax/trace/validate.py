"""What makes a trace valid, and which objects are known to be so."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.types import Trace

_BLOCK = 1 << 16  # tokens checked at once: bounds the temporaries of a trace of millions of tokens
_VALID: weakref.WeakValueDictionary[int, Trace] = weakref.WeakValueDictionary()  # by id: traces that passed `validate`


def validate(trace: Trace, place: str = "trace") -> None:
    """Checks a trace; raises `SpecmdError` naming ``place`` and the first bad request, token (in its request), layer.

    It checks shapes, ranks and dtypes; ids in 0..E-1 or -1; no expert twice for a token at a layer; lengths that are
    positive and sum to N; prompts no longer than their request; gates finite and not negative; logits and ahead not NaN
    (-inf is allowed: a router may mask experts); expert bytes above 0; a meta row per request; accepted counts, if the
    meta has them, a list of whole numbers above 0 per request.
    """
    validate_shapes(trace, place)
    validate_cells(trace, place)
    _VALID[id(trace)] = trace


def is_valid(trace: Trace) -> bool:
    """Whether `validate` has passed this very object; changes of its arrays since then go unseen."""
    return _VALID.get(id(trace)) is trace


def validate_cells(trace: Trace, place: str, first_request: int = 0) -> None:
    """Does the part of `validate` that looks at every token; requests are named from `first_request` on."""
    for start in range(0, trace.tokens, _BLOCK):
        _check_block(trace, start, min(start + _BLOCK, trace.tokens), place, first_request)


def validate_shapes(trace: Trace, place: str) -> None:
    """Does the part of `validate` that looks into no array of tokens."""
    _check_types(trace, place)
    ids = integers(trace.expert_ids, "expert_ids", 3, place)
    tokens, layers, top_k = ids.shape
    for name, axis in (("tokens", tokens), ("layers", layers), ("top_k", top_k), ("experts", trace.experts)):
        if axis < 1:
            raise SpecmdError(f"{place}: the trace has {axis} {name}, expected at least 1")
    if top_k > trace.experts:
        raise SpecmdError(f"{place}: top_k is {top_k} with {trace.experts} experts, expected no more")
    _check_requests(trace, place)
    sizes = trace.expert_bytes
    if sizes.shape != (layers,) or sizes.dtype.kind not in "iu":
        raise SpecmdError(
            f"{place}: expert_bytes is {sizes.dtype} of shape {list(sizes.shape)}, expected {layers} integers"
        )
    for layer in np.flatnonzero(trace.expert_bytes < 1)[:1]:
        raise SpecmdError(f"{place}: expert_bytes of layer {layer} is {sizes[layer]}, expected an integer >= 1")
    for name, array in (("gates", trace.gates), ("logits", trace.logits), ("ahead", trace.ahead)):
        if array is None:
            continue
        expected = (tokens, layers, top_k if name == "gates" else trace.experts)
        if array.shape != expected:
            raise SpecmdError(f"{place}: {name} has shape {list(array.shape)}, expected {list(expected)}")
        if array.dtype.kind != "f":
            raise SpecmdError(f"{place}: {name} has dtype {array.dtype}, expected floats")


def _check_types(trace: Trace, place: str) -> None:
    for field in dataclasses.fields(trace):
        value = getattr(trace, field.name)
        if field.name == "experts":
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise SpecmdError(f"{place}: experts is {value!r}, expected an integer")
        elif field.name == "meta":
            if not isinstance(value, dict):
                raise SpecmdError(f"{place}: meta is of type {type(value).__name__}, expected a dict")
        elif not isinstance(value, np.ndarray) and not (value is None and field.default is None):
            raise SpecmdError(f"{place}: {field.name} is of type {type(value).__name__}, expected a numpy array")


def _check_requests(trace: Trace, place: str) -> None:
    for name, array in (("lengths", trace.lengths), ("prompt_lengths", trace.prompt_lengths)):
        integers(array, name, 1, place)
    if not trace.requests:
        raise SpecmdError(f"{place}: lengths is empty, expected at least one request")
    if trace.prompt_lengths.shape != trace.lengths.shape:
        raise SpecmdError(
            f"{place}: prompt_lengths has {trace.prompt_lengths.shape[0]} entries, "
            f"expected {trace.requests} (one per request, as lengths)"
        )
    for request in np.flatnonzero(trace.lengths < 1)[:1]:
        raise SpecmdError(f"{place}: request {request}: length is {trace.lengths[request]}, expected at least 1")
    _check_accepted(trace, place)
    total = int(trace.lengths.sum(dtype=np.int64))
    if total != trace.tokens:
        raise SpecmdError(f"{place}: lengths sum to {total}, expected {trace.tokens} (the tokens of expert_ids)")
    for request in np.flatnonzero((trace.prompt_lengths < 0) | (trace.prompt_lengths > trace.lengths))[:1]:
        raise SpecmdError(
            f"{place}: request {request}: prompt_length is {trace.prompt_lengths[request]}, "
            f"expected 0 to its length {trace.lengths[request]}"
        )
    rows = trace.meta.get("requests")
    if rows is None:
        return
    if not isinstance(rows, list) or len(rows) != trace.requests:
        found = f"{len(rows)} rows" if isinstance(rows, list) else repr(rows)
        raise SpecmdError(f"{place}: meta key 'requests' has {found}, expected a list of {trace.requests} rows")
    for request, row in enumerate(rows):
        if not isinstance(row, dict):
            raise SpecmdError(f"{place}: meta row of request {request} is {row!r}, expected an object")


def _check_accepted(trace: Trace, place: str) -> None:
    rows = trace.meta.get("accepted")
    if rows is None:
        return
    if not isinstance(rows, list) or len(rows) != trace.requests:
        found = f"{len(rows)} rows" if isinstance(rows, list) else repr(rows)
        raise SpecmdError(f"{place}: meta key 'accepted' has {found}, expected a list of {trace.requests} rows")
    for request, row in enumerate(rows):
        if not isinstance(row, list):
            raise SpecmdError(f"{place}: request {request}: accepted counts are {row!r}, expected a list")
        for number, count in enumerate(row):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise SpecmdError(
                    f"{place}: request {request}, decode pass {number}: {count!r} tokens accepted, expected a whole "
                    "number of at least 1"
                )


def _check_block(trace: Trace, start: int, stop: int, place: str, first_request: int) -> None:
    """Checks the cells of tokens start..stop-1."""

    def where(token: int, layer: int) -> str:
        return _where(trace, start + token, layer, place, first_request)

    ids = trace.expert_ids[start:stop]
    bad = (ids < -1) | (ids >= trace.experts)
    if bad.any():
        token, layer, slot = _first(bad)
        found = ids[token, layer, slot]
        hint = "; ids count from 0" if found == trace.experts else ""
        raise SpecmdError(
            f"{where(token, layer)}: expert id is {found}, expected 0 to {trace.experts - 1}, or -1 for none{hint}"
        )
    ordered = np.sort(ids, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        token, layer, slot = _first(twice)
        raise SpecmdError(
            f"{where(token, layer)}: expert {ordered[token, layer, slot]} appears twice, expected distinct experts"
        )
    if trace.gates is not None:
        gates = trace.gates[start:stop]
        bad = ~(np.isfinite(gates) & (gates >= 0))
        if bad.any():
            token, layer, slot = _first(bad)
            raise SpecmdError(
                f"{where(token, layer)}: gate is {gates[token, layer, slot]}, expected a finite number >= 0"
            )
    for name, array in (("logits", trace.logits), ("ahead", trace.ahead)):
        if array is None:
            continue
        bad = np.isnan(array[start:stop])
        if bad.any():
            token, layer, expert = _first(bad)
            raise SpecmdError(f"{where(token, layer)}: {name} of expert {expert} is NaN, expected a number")


def _first(bad: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    token, layer, last = np.unravel_index(int(bad.argmax()), bad.shape)
    return int(token), int(layer), int(last)


def _where(trace: Trace, token: int, layer: int, place: str, first_request: int) -> str:
    ends = np.cumsum(trace.lengths, dtype=np.int64)
    request = int(np.searchsorted(ends, token, side="right"))
    position = token - (ends[request] - trace.lengths[request])
    return f"{place}: request {first_request + request}, token {position}, layer {layer}"


def integers(array: npt.NDArray[Any], name: str, rank: int, place: str) -> npt.NDArray[Any]:
    if array.ndim != rank:
        raise SpecmdError(f"{place}: {name} has shape {list(array.shape)}, expected {rank} dimension{'s' * (rank > 1)}")
    if array.dtype.kind not in "iu":
        raise SpecmdError(f"{place}: {name} has dtype {array.dtype}, expected integers")
    return array
