"""Cache capacities: bytes, MiB, percent, slots, slots per layer or token cycles in; whole bytes out, and back to show.

A *budget* is what a replay takes: whole bytes of one pool (scope ``global``) or ``[L]`` whole bytes of each layer's own
pool (scope ``layer``). All arithmetic is in integers and fractions, so 25 % of 768 equal experts holds exactly 192.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.units import MIB

Quotas: TypeAlias = npt.NDArray[np.int64]  # [L] bytes
Budget: TypeAlias = int | Quotas
Capacity: TypeAlias = str | float | Sequence[float] | npt.NDArray[Any]

SCOPES = ("global", "layer")

_BYTES_OF_UNIT = {
    **{"": 1, "b": 1, "bytes": 1},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}

_TEXT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,2})?|[-+]?(?:nan|inf(?:inity)?))\s*(\D*)", re.IGNORECASE)
_FORMS = "'4000MiB', '6GiB', '2.5GB', '25%', '51 slots', '12 slots/layer', '1.5 cycles' or a number of bytes"
_MOST_BYTES = (1 << 63) - 1


@overload
def parse_capacity(
    value: Capacity, *, expert_bytes: npt.ArrayLike, experts: int, top_k: int, scope: Literal["global"] = "global"
) -> int: ...
@overload
def parse_capacity(
    value: Capacity, *, expert_bytes: npt.ArrayLike, experts: int, top_k: int, scope: Literal["layer"]
) -> Quotas: ...
@overload
def parse_capacity(value: Capacity, *, expert_bytes: npt.ArrayLike, experts: int, top_k: int, scope: str) -> Budget: ...
def parse_capacity(
    value: Capacity, *, expert_bytes: npt.ArrayLike, experts: int, top_k: int, scope: str = "global"
) -> Budget:
    """Gives the budget that `value` names for a model of ``[L]`` `expert_bytes`, with E `experts` and `top_k` of them.

    ============================  ====================================================================================
    ``4000MiB 6GiB 2.5GB 4096``   bytes (kB, MB, GB, TB by 1000; KiB, MiB, GiB, TiB by 1024)
    ``25%``                       share of the bytes of all experts; at most 100 %
    ``51 slots``                  51 times the *largest* expert, so that any 51 experts fit
    ``12 slots/layer``            12 experts of every layer, at that layer's size
    ``1.5 cycles``                token cycles: top_k experts of every layer
    ``[b0, b1, ...]``             explicit bytes of each layer (scope ``layer`` only)
    ============================  ====================================================================================

    A number of bytes may be more than all experts take; in every other unit that is refused as a slip. Fractions of a
    byte are dropped. In scope ``layer`` a total amount gives each layer ``total // L``; only
    ``slots/layer`` and explicit bytes follow the layers' sizes.

    Raises `SpecmdError` if `value` cannot be read, is negative or not finite, is a share or a number of slots or cycles
    above all experts, exceeds a signed 64-bit integer, or holds less than one expert (of the largest layer; in scope
    ``layer``, of each layer).
    """
    sizes = _sizes(expert_bytes)
    if scope not in SCOPES:
        raise unknown("cache scope", scope, SCOPES)

    quotas: list[int] | None = None  # of each layer, where the value itself names them
    total = 0
    if isinstance(value, str):
        number, unit = _parse_text(value)
        most = {"%": 100, "slots": experts * len(sizes), "slots/layer": experts, "cycles": Fraction(experts, top_k)}
        if unit in most and number > most[unit]:
            raise SpecmdError(f"capacity {value!r} is above everything: expected at most {float(most[unit]):g} {unit}")
        if unit == "slots/layer":
            quotas = [_whole(number, value) * size for size in sizes]
        elif unit == "slots":
            total = _whole(number, value) * max(sizes)
        elif unit == "%":
            total = math.floor(number * experts * sum(sizes) / 100)
        elif unit == "cycles":
            total = math.floor(number * top_k * sum(sizes))
        else:
            total = _bytes(number * _BYTES_OF_UNIT[unit], value)
    elif isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0):
        if scope != "layer":
            raise SpecmdError("capacity: bytes of each layer need cache scope 'layer', not 'global'")
        if np.ndim(value) != 1 or len(value) != len(sizes):
            raise SpecmdError(f"capacity: expected the bytes of {len(sizes)} layers, got shape {np.shape(value)}")
        quotas = [math.floor(_number(item, f"capacity of layer {layer}")) for layer, item in enumerate(value)]
    else:
        total = _bytes(_number(value, "capacity"), value)

    if scope == "layer":
        quotas = [total // len(sizes)] * len(sizes) if quotas is None else quotas
        for layer, (quota, size) in enumerate(zip(quotas, sizes, strict=True)):
            _check(
                quota, size, f"capacity {_shown(value)} gives layer {layer} {quota} bytes", "one expert of that layer"
            )
        return np.array(quotas, np.int64)

    total = total if quotas is None else sum(quotas)
    _check(total, max(sizes), f"capacity {_shown(value)} is {total} bytes", "one expert of the largest layer")
    return total


def describe_capacity(
    budget: Budget, *, expert_bytes: npt.ArrayLike, experts: int, top_k: int
) -> dict[str, int | float]:
    """Gives `budget` in every unit: ``bytes``, ``mib``, ``percent``, ``slots``, ``slots_per_layer``, ``cycles``.

    ``slots`` is how many experts always fit: of the largest size in one pool, of each layer's size in its own.
    ``slots_per_layer`` is its mean over the layers. ``cycles`` is C/T; below 1, LRU over one pool cannot hit in decode.
    """
    sizes = _sizes(expert_bytes)
    if np.ndim(budget) == 0:
        total = int(budget)
        slots = total // max(sizes)
    else:
        quotas = [int(quota) for quota in np.asarray(budget)]
        if len(quotas) != len(sizes):
            raise SpecmdError(f"capacity: expected the bytes of {len(sizes)} layers, got {len(quotas)}")
        total = sum(quotas)
        slots = sum(quota // size for quota, size in zip(quotas, sizes, strict=True))
    return {
        "bytes": total,
        "mib": total / MIB,
        "percent": float(Fraction(100 * total, experts * sum(sizes))),
        "slots": slots,
        "slots_per_layer": slots / len(sizes),
        "cycles": float(Fraction(total, top_k * sum(sizes))),
    }


def format_capacity(budget: Budget, *, expert_bytes: npt.ArrayLike, experts: int, top_k: int) -> str:
    """Gives one line with `budget` in every unit; it ends in a warning below one token cycle."""
    shown = describe_capacity(budget, expert_bytes=expert_bytes, experts=experts, top_k=top_k)
    line = (
        f"{shown['mib']:.1f} MiB = {shown['percent']:.2f} % of all experts = {shown['slots']} slots "
        f"({shown['slots_per_layer']:.2f} a layer) = {shown['cycles']:.3f} token cycles"
    )
    return line if shown["cycles"] >= 1 else f"{line}; below one token cycle, where recency alone cannot hit"


def _sizes(expert_bytes: npt.ArrayLike) -> list[int]:
    """Gives the sizes [L] as Python integers, which cannot overflow."""
    sizes = [int(size) for size in np.atleast_1d(np.asarray(expert_bytes))]
    for layer, size in enumerate(sizes):
        if size <= 0:
            raise SpecmdError(f"expert_bytes of layer {layer} is {size}: expected a positive number of bytes")
    return sizes


def _parse_text(text: str) -> tuple[Fraction, str]:
    """Gives the number and its unit: a key of `_BYTES_OF_UNIT`, or ``%``, ``slots``, ``slots/layer``, ``cycles``."""
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise SpecmdError(f"capacity {text!r} cannot be read: expected {_FORMS}")
    digits, unit = match[1], " ".join(match[2].lower().split())
    unit = re.sub(r"^slots? ?(?:/|a|per) ?layer$", "slots/layer", unit)
    unit = {"slot": "slots", "cycle": "cycles", "token cycle": "cycles", "token cycles": "cycles"}.get(unit, unit)
    if unit not in _BYTES_OF_UNIT and unit not in ("%", "slots", "slots/layer", "cycles"):
        raise SpecmdError(f"capacity {text!r} has an unknown unit {match[2].strip()!r}: expected {_FORMS}")
    if digits[-1].isalpha():
        raise SpecmdError(f"capacity {text!r} is not a finite number: expected {_FORMS}")
    return _not_negative(Fraction(digits), f"capacity {text!r}"), unit


def _number(value: Any, place: str) -> Fraction:
    """Gives a plain number of bytes, exactly."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecmdError(f"{place} is {value!r}: expected {_FORMS}")
    if not math.isfinite(value):
        raise SpecmdError(f"{place} is {value!r}: expected a finite number of bytes")
    return _not_negative(Fraction(value), f"{place} {value!r}")


def _not_negative(number: Fraction, place: str) -> Fraction:
    if number < 0:
        raise SpecmdError(f"{place} is negative: expected at least one expert")
    return number


def _whole(number: Fraction, text: str) -> int:
    if number.denominator != 1:
        raise SpecmdError(f"capacity {text!r}: expected a whole number of slots")
    return int(number)


def _bytes(number: Fraction, value: Capacity) -> int:
    """Gives whole bytes; a share that lacks its sign is recognised by being less than one of them."""
    if 0 < number < 1:
        raise SpecmdError(f"capacity {_shown(value)} is less than one byte: did you mean '{float(100 * number):g}%'?")
    return math.floor(number)


def _check(size: int, least: int, what: str, of: str) -> None:
    if size < least:
        raise SpecmdError(f"{what}: expected at least {of} ({least} bytes)")
    if size > _MOST_BYTES:
        raise SpecmdError(f"{what}: expected at most {_MOST_BYTES} bytes")


def _shown(value: Capacity) -> str:
    return repr(value) if isinstance(value, str | int | float) else "list"
