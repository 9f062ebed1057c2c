"""The numbers that a policy accepts, declared in the signature of its factory: `decay: Share = 0.9`.

`check_numbers` reads the declarations before anything is traced; a swept number is checked value by value.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeAlias, get_args, get_origin, get_type_hints

import jax
import numpy as np
from jax.core import Tracer

from specmd_jax.errors import SpecmdError


class Range(NamedTuple):
    """Finite numbers from `low` to `high`; an open end is not itself part of the range."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    whole: bool = False

    def holds(self, values: np.ndarray) -> np.ndarray | np.bool_:
        """Whether each value lies inside (NaN does not)."""
        above = values > self.low if self.low_open else values >= self.low
        below = values < self.high if self.high_open else values <= self.high
        return above & below & np.isfinite(values) & ((values == np.floor(values)) | (not self.whole))

    def __str__(self) -> str:
        what = "a whole number " if self.whole else ""
        if math.isinf(self.high):
            return f"{what}{'above' if self.low_open else 'of at least'} {self.low:g}"
        low = f"above {self.low:g}" if self.low_open else f"{'from ' if what else ''}{self.low:g}"
        return f"{what}{low} up to{', but not including,' if self.high_open else ''} {self.high:g}"


Real: TypeAlias = float | int | jax.Array  # an array: traced, or a row of the values that a study goes over
Whole: TypeAlias = int | jax.Array

Share: TypeAlias = Annotated[Real, Range(0, 1)]
PositiveShare: TypeAlias = Annotated[Real, Range(0, 1, low_open=True)]
Percentile: TypeAlias = Annotated[Real, Range(0, 100, high_open=True)]
Strength: TypeAlias = Annotated[Real, Range(0)]
Positive: TypeAlias = Annotated[Real, Range(0, low_open=True)]
Weight: TypeAlias = Annotated[Real, Range(-8, 8)]
Count: TypeAlias = Annotated[Whole, Range(0, 2**31 - 1, whole=True)]
Gain: TypeAlias = Annotated[Real, Range(0, 2**29)]  # int32 keep-scores have room for it
Seed: TypeAlias = Annotated[Whole, Range(0, 2**31 - 1, whole=True)]


def check_numbers(policy: str, factory: Callable[..., Any] | None, given: Mapping[str, Any]) -> None:
    """Raises SpecmdError if a setting is not of the kind, or not in the range, that the policy's factory declares.

    `policy` is what to call it, such as "eviction 'lfu_decay'". Settings without a declaration and values that are
    being traced are not looked at.
    """
    if factory is None or not given:
        return
    function = factory.func if isinstance(factory, functools.partial) else factory
    try:
        hints = get_type_hints(function, include_extras=True) if inspect.isfunction(function) else {}
    except NameError:  # a user's annotations may name what only a type checker imports: they declare no range
        hints = {}
    for name, value in given.items():
        hint = hints.get(name)
        if isinstance(value, Tracer):
            continue
        if hint is str and not isinstance(value, str):
            raise SpecmdError(f"{policy}: {name} is {value!r}, expected a name")
        ranges = [a for a in get_args(hint) if isinstance(a, Range)] if get_origin(hint) is Annotated else []
        for allowed in ranges:
            values = np.asarray(value)
            if values.dtype.kind not in "iuf":
                raise SpecmdError(f"{policy}: {name} is {value!r}, expected {allowed}")
            bad = values[~allowed.holds(values.astype(np.float64))]
            if bad.size:
                raise SpecmdError(f"{policy}: {name} is {bad.flat[0]}, expected {allowed}")
