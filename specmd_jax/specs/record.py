"""A `ModelSpec` as plain JSON: how a trace carries a model that is not listed, or is stored at other precisions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from specmd_jax.errors import SpecmdError, shown, unknown
from specmd_jax.specs.attention import KeyValues
from specmd_jax.specs.reading import MOST
from specmd_jax.specs.spec import ModelSpec

META_KEY = "spec"
"""The key of a trace's meta that has such a record; it counts before the model's name."""

_TEXTS = ("name", "source", "notes")
_POSITIVE = ("layers", "experts", "top_k", "d_model", "d_ff")


def to_record(spec: ModelSpec) -> dict[str, Any]:
    """Gives the model as a dictionary that JSON can hold."""
    return asdict(spec) | {"attention": [list(kind) for kind in spec.attention]}


def from_record(record: Any, place: str) -> ModelSpec:
    """Reads what `to_record` gave. Raises SpecmdError naming `place` and the field that is amiss."""
    if not isinstance(record, Mapping):
        raise SpecmdError(f"{place} is {shown(record)}, expected an object with the fields of a ModelSpec")
    known = {field.name: field for field in fields(ModelSpec)}
    for name in record:
        if name not in known:
            raise unknown(f"field of {place}:", name, known)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name not in record:
            if field.default is MISSING:
                raise SpecmdError(f"{place}: {name} is missing")
            continue
        value = record[name]
        if name in _TEXTS:
            values[name] = str(value)
        elif name == "attention":
            values[name] = tuple(_kind(kind, f"{place}: attention") for kind in _list(value, f"{place}: attention"))
        else:
            least = 1 if name in _POSITIVE else 0
            whole = field.type == "int"
            values[name] = _number(value, f"{place}: {name}", least, whole)
    spec = ModelSpec(**values)
    for name in ("weights_bits", "dense_bits", "head_bits", "embed_bits", "kv_bits"):
        if not 0 < getattr(spec, name) <= 64:
            raise SpecmdError(f"{place}: {name} is {getattr(spec, name)}, expected above 0 and at most 64")
    return spec


def _kind(value: Any, place: str) -> KeyValues:
    numbers = [_number(one, place, 0, False) for one in _list(value, place)]
    if len(numbers) != len(KeyValues._fields) or numbers[KeyValues._fields.index("every")] < 1:
        raise SpecmdError(f"{place} has {shown(value)}, expected {', '.join(KeyValues._fields)}")
    *whole, bits = numbers
    return KeyValues(*(int(one) for one in whole), state_bits=float(bits))


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise SpecmdError(f"{place} is {shown(value)}, expected a list")
    return list(value)


def _number(value: Any, place: str, least: int, whole: bool) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not least <= value <= MOST * MOST or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise SpecmdError(f"{place} is {shown(value)}, expected {kind} of at least {least}")
    return int(value) if whole else value
