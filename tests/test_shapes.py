"""Annotations are executed: a wrong shape or dtype ends the call that it is given to."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError
from parity import small_trace

from specmd_jax.policies.eviction import lru
from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.demand import pack, widest_demand


def test_a_record_with_a_wrong_shape_is_refused() -> None:
    schedule = build_schedule(small_trace(0))
    with pytest.raises(TypeCheckError, match="parameter 'schedule'"):
        pack(replace(schedule, mass=schedule.mass[:, :-1]))
    with pytest.raises(TypeCheckError, match="parameter 'schedule'"):
        pack(replace(schedule, rank=schedule.rank.astype(np.int64)))


def test_axes_that_differ_by_one_are_refused() -> None:
    demand = pack(build_schedule(small_trace(0)))
    assert widest_demand(demand, 4).shape == (4,)
    with pytest.raises(TypeCheckError, match="parameter 'demand'"):
        widest_demand(demand._replace(start=demand.start[:-1]), 4)


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'trace'"):
        build_schedule(None)  # pyright: ignore[reportArgumentType]


def modules() -> Iterator[ModuleType]:
    """Those whose annotations are executed."""
    for name in shapes.ROOMS:
        room = importlib.import_module(name)
        yield room
        for inner in pkgutil.iter_modules(getattr(room, "__path__", []), f"{name}."):
            yield importlib.import_module(inner.name)


def test_every_annotation_can_be_read() -> None:
    """One that cannot be read would pass for anything."""
    seen = 0
    for module in modules():
        own = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == module.__name__]
        for thing in own:
            if inspect.isclass(thing) or inspect.isfunction(thing):
                get_type_hints(thing)
                seen += 1
    assert seen > len(shapes.ROOMS)


@pytest.mark.usefixtures("strict_promotion")
def test_nothing_is_promoted_where_a_test_asks_for_it() -> None:
    with pytest.raises(jax.dtypes.TypePromotionError):
        _ = jnp.arange(3) + jnp.zeros(3)
    with pytest.raises(ValueError, match="rank_promotion"):
        _ = jnp.zeros((2, 3)) + jnp.zeros(3)


def _built(hint: type) -> Callable[[object], object]:
    """A function made anew at each call, as a policy's are."""

    def same(value: hint) -> hint:  # pyright: ignore[reportInvalidTypeForm]
        return value

    same.__annotations__ = {"value": hint, "return": hint}
    return same


def test_functions_of_one_signature_share_their_checks_and_others_do_not() -> None:
    words, numbers = shapes.checked(_built(str)), shapes.checked(_built(int))
    assert shapes.checked(_built(str)) is words and numbers is not words
    assert words("a") == "a" and numbers(1) == 1
    for wrong, value in ((words, 1), (numbers, "a")):
        with pytest.raises(BeartypeCallHintViolation):
            wrong(value)


def test_a_policy_built_again_is_still_checked() -> None:
    for _ in range(2):
        built = lru()
        with pytest.raises(TypeCheckError, match="parameter 'start'"):
            built.init(None)  # pyright: ignore[reportArgumentType]
