"""Product, reference and contract have the same policies, and each the same numbers with the same defaults."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import reference

import specmd_jax
from specmd_jax.policies import EVICTION, MISS, PREFETCH, ROUTING, SELECTION

AXES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "eviction": (EVICTION, reference.EVICTION),
    "prefetch": (PREFETCH, reference.PREFETCH),
    "selection": (SELECTION, reference.SELECTION),
    "miss": (MISS, reference.MISS),
    "routing": (ROUTING, reference.ROUTING),
}
POLICIES = [(axis, name) for axis, (product, _) in AXES.items() for name in product]
CONTRACT = next(Path(specmd_jax.__file__).parent.rglob("CONTRACT.md")).read_text(encoding="utf-8")
IN_A_TABLE = re.compile(r"^\| `(\w+)(?:\(([^)]*)\))?`", re.MULTILINE)
IN_A_LINE = re.compile(r"`(\w+)\((\w+ = [^)]*)\)`")


def numbers(factory: Callable[..., Any] | None) -> dict[str, Any]:
    """A policy's settings as they are when nobody says anything."""
    if factory is None:
        return {}
    partial = factory if isinstance(factory, functools.partial) else functools.partial(factory)
    signature = inspect.signature(partial.func)
    bound = signature.bind_partial(*partial.args, **partial.keywords)
    bound.apply_defaults()
    return {
        name: value
        for name, value in bound.arguments.items()
        if signature.parameters[name].default is not inspect.Parameter.empty
    }


@pytest.mark.parametrize("axis", AXES)
def test_the_reference_has_every_policy(axis: str) -> None:
    product, slow = AXES[axis]
    assert set(product) == set(slow)


@pytest.mark.parametrize(("axis", "name"), POLICIES)
def test_the_reference_has_the_same_defaults(axis: str, name: str) -> None:
    product, slow = AXES[axis]
    assert numbers(product[name]) == numbers(slow[name])


def test_the_contract_states_the_defaults() -> None:
    stated: dict[tuple[str, frozenset[str]], dict[str, str]] = {}
    for name, inside in [*IN_A_TABLE.findall(CONTRACT), *IN_A_LINE.findall(CONTRACT)]:
        pairs = dict(part.split(" = ") for part in inside.split(", ") if " = " in part)
        stated[name, frozenset(pairs)] = pairs
    for axis, name in POLICIES:
        factory = AXES[axis][0][name]
        found = {k: v for k, v in numbers(factory).items() if v != ""}  # "": the checkpoint that is bundled
        if found and not isinstance(factory, functools.partial):  # a variant has a row of its own in the table alone
            said = stated.get((name, frozenset(found)))
            assert said is not None, f"the contract does not state the numbers of {axis} {name!r}"
            assert said == {k: v if isinstance(v, str) else f"{v:g}" for k, v in found.items()}
