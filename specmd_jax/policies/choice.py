"""Policies as values: a name, a function or a policy that is already built becomes a `Choice`, once, at the door.

A `Choice` is a pytree. The numbers of the policy are its leaves; the function that makes the policy, and settings that
are no numbers, are static. So a choice goes through `jit`, `vmap` and `grad` like any other argument, two values of a
number share one compiled program, and a function of the user's own is as good as a row of a table.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from specmd_jax.errors import SpecmdError, find, unknown
from specmd_jax.policies.admission import ADMISSION
from specmd_jax.policies.base import Admission, Eviction, Miss, Policies, Prefetch, Routing, Selection
from specmd_jax.policies.eviction import EVICTION
from specmd_jax.policies.miss import MISS
from specmd_jax.policies.numbers import check_numbers
from specmd_jax.policies.prefetch import PREFETCH, SELECTION
from specmd_jax.policies.routing import ROUTING


class Axis(NamedTuple):
    """One of the things that a policy decides."""

    table: Mapping[str, Callable[..., Any] | None]
    kind: type  # what a function on this axis returns
    what: str  # what messages call a policy of this axis, with its article

    @property
    def returned(self) -> str:
        """What a function on this axis returns, with its article."""
        return f"{'an' if self.kind.__name__[0] in 'AEIOU' else 'a'} {self.kind.__name__}"

    @property
    def optional(self) -> bool:
        """Whether nothing can happen on this axis."""
        return None in self.table.values()


AXES: dict[str, Axis] = {
    "eviction": Axis(EVICTION, Eviction, "an eviction policy"),
    "prefetch": Axis(PREFETCH, Prefetch, "a prefetch policy"),
    "selection": Axis(SELECTION, Selection, "a prefetch selection"),
    "miss": Axis(MISS, Miss, "a miss policy"),
    "routing": Axis(ROUTING, Routing, "a routing policy"),
    "admission": Axis(ADMISSION, Admission, "an admission policy"),
    "host_eviction": Axis({"none": None, **EVICTION}, Eviction, "an eviction policy"),
}


class _Built:
    """A policy that the user has built: a function without settings, equal to itself alone."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __call__(self) -> Any:
        return self.policy


@jax.tree_util.register_pytree_node_class
class Choice:
    """A policy's function with its settings. Leaves are the numbers, in the order of their names."""

    __slots__ = ("axis", "factory", "name", "numbers", "texts")

    def __init__(
        self,
        axis: str,
        name: str,
        factory: Callable[..., Any] | None,
        texts: tuple[tuple[str, Hashable], ...] = (),
        numbers: Mapping[str, Any] | None = None,
    ) -> None:
        self.axis, self.name, self.factory, self.texts = axis, name, factory, texts
        self.numbers = dict(sorted((numbers or {}).items()))

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return tuple(self.numbers.values()), (self.axis, self.name, self.factory, self.texts, tuple(self.numbers))

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> Choice:
        axis, name, factory, texts, names = static
        return cls(axis, name, factory, texts, dict(zip(names, leaves, strict=True)))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in [*self.texts, *self.numbers.items()])
        return f"{self.name}({settings})" if settings else self.name

    @property
    def accepted(self) -> tuple[str, ...]:
        """Names of the settings that may be given, of those not fixed by the row itself."""
        return () if self.factory is None else _parameters(self.factory)

    @property
    def is_built(self) -> bool:
        """Whether the user built the policy, so that its numbers are out of sight."""
        return isinstance(self.factory, _Built)

    def having(self, settings: Mapping[str, Any]) -> Choice:
        """Changes some settings of a copy; raises SpecmdError for one that the policy does not take or allow."""
        texts, numbers = dict(self.texts), dict(self.numbers)
        unwanted = sorted(settings.keys() - set(self.accepted))
        if unwanted:
            takes = ", ".join(self.accepted) or "none"
            raise SpecmdError(f"{self.axis} {self.name!r} has no number {unwanted[0]!r}; it takes: {takes}")
        check_numbers(f"{self.axis} {self.name!r}", self.factory, settings)
        for name, value in settings.items():
            if isinstance(value, str) and _is_number(_default(self.factory, name)):
                raise SpecmdError(f"{self.axis} {self.name!r}: {name} is {value!r}, expected a number")
        for name, value in settings.items():
            (numbers if _is_number(value) else texts)[name] = value
        return Choice(self.axis, self.name, self.factory, _static(self, texts), numbers)

    def build(self) -> Any:
        """Gives the policy, or None where nothing happens; raises SpecmdError if the function returns anything else."""
        if self.factory is None:
            return None
        numbers = {name: _for_jax(value) for name, value in self.numbers.items()}
        built, axis = self.factory(**dict(self.texts), **numbers), AXES[self.axis]
        if not isinstance(built, axis.kind):
            raise SpecmdError(
                f"{self.axis} {self.name!r} returns {type(built).__name__}, expected {axis.returned} "
                "(specmd_jax.policies.base)"
            )
        return built


Chosen: TypeAlias = (
    str | Callable[..., Any] | Eviction | Prefetch | Selection | Miss | Routing | Admission | Choice | None
)
"""What is accepted for a policy: a name, a function that returns one, one that is built, or nothing."""


def choose(axis: str, given: object, settings: Mapping[str, Any] | None = None) -> Choice:
    """Resolves what is given for an axis, with `settings` by name.

    Raises SpecmdError for an unknown name, something that is no policy of this axis, or settings that it does not take.
    """
    about = AXES[axis]
    if isinstance(given, Choice):
        if given.axis != axis:
            raise SpecmdError(f"{axis} is {given.name!r}, {AXES[given.axis].what}: expected {about.what}")
        return given.having(settings or {})
    if isinstance(given, str):
        name = find(about.what.partition(" ")[2], given, about.table)
        function, bound, fixed = _unwrapped(about.table[name])
    elif given is None and about.optional:
        name, function, bound, fixed = next(row for row, made in about.table.items() if made is None), None, {}, ()
    elif isinstance(given, about.kind):
        name, function, bound, fixed = "custom", _Built(given), {}, ()
    elif callable(given):
        function, bound, fixed = _unwrapped(given)
        name = getattr(function, "__name__", "custom").strip("<>")
        lacking = [p for p in _required(function) if p not in bound and p not in (settings or {})]
        if lacking:
            raise SpecmdError(
                f"{axis} {name!r} needs {lacking[0]!r}: expected a function that returns {about.returned} and whose "
                "settings have defaults or are given"
            )
    else:
        raise SpecmdError(
            f"{axis} is {given!r}, expected {about.what}: its name, a function that returns {about.returned}, or one "
            "that is built"
        )
    refused = sorted((settings or {}).keys() & set(fixed))
    if refused:
        raise SpecmdError(f"{axis} {name!r} has no number {refused[0]!r}: the name says what it is")
    return Choice(axis, name, function).having(bound).having(settings or {})


class Mix(NamedTuple):
    """One choice for each axis: a pytree whose leaves are all numbers of all policies."""

    eviction: Choice
    prefetch: Choice
    selection: Choice
    miss: Choice
    routing: Choice
    admission: Choice
    host_eviction: Choice = Choice("host_eviction", "none", None)

    @classmethod
    def of(
        cls,
        eviction: Chosen = "lru",
        prefetch: Chosen = "none",
        selection: Chosen = "topk",
        miss: Chosen = "fetch",
        routing: Chosen = "standard",
        admission: Chosen = "always",
        host_eviction: Chosen = None,
        numbers: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Mix:
        """Resolves one policy for each axis; `numbers` are settings by axis."""
        given = {
            "eviction": eviction,
            "prefetch": prefetch,
            "selection": selection,
            "miss": miss,
            "routing": routing,
            "admission": admission,
            "host_eviction": host_eviction,
        }
        for axis in numbers or {}:
            if axis not in AXES:
                raise unknown("policy axis", axis, AXES)
        return cls(*(choose(axis, chosen, (numbers or {}).get(axis)) for axis, chosen in given.items()))

    def build(self) -> Policies:
        """Gives the policies. Without a predictor there is nothing to select from."""
        built = {choice.axis: choice.build() for choice in self}
        if built["prefetch"] is None:
            built["selection"] = None
        return Policies(**built)

    def at(self, place: int) -> Mix:
        """Gives the same with one value of each number that is a row of values."""
        return jax.tree.map(lambda leaf: leaf[place] if np.ndim(leaf) else leaf, self)

    def declared(self) -> Policies:
        """Builds the policies for what they declare, which no value of a number changes."""
        return self.at(0).build()

    def traced(self) -> Mix:
        """Gives the same with arrays for numbers."""
        return jax.tree.map(jnp.asarray, self)


def _is_number(value: Any) -> bool:
    """Whether a setting is a leaf."""
    if isinstance(value, bool | str):
        return False
    return isinstance(value, int | float | np.number | np.ndarray | jax.Array)


def _for_jax(value: Any) -> Any:
    """A number as the policies' functions take it: plain, or an array of JAX."""
    if isinstance(value, np.generic):
        return value.item()
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def _static(choice: Choice, texts: Mapping[str, Any]) -> tuple[tuple[str, Hashable], ...]:
    for name, value in texts.items():
        if not isinstance(value, Hashable):
            raise SpecmdError(f"{choice.axis} {choice.name!r}: {name} is {value!r}, expected a number or a name")
    return tuple(sorted(texts.items()))


def _unwrapped(made: Callable[..., Any] | None) -> tuple[Callable[..., Any] | None, dict[str, Any], tuple[str, ...]]:
    """The function inside partial applications, the settings that they bind, and those bound by position, for good."""
    bound: dict[str, Any] = {}
    fixed: tuple[str, ...] = ()
    while isinstance(made, functools.partial):
        positional = tuple(inspect.signature(made.func).parameters)[: len(made.args)]
        bound = dict(zip(positional, made.args, strict=False)) | made.keywords | bound
        fixed += positional
        made = made.func
    return made, bound, fixed


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Gives the names of the settings that a policy's function takes."""
    return tuple(inspect.signature(function).parameters)


def _default(function: Callable[..., Any] | None, name: str) -> Any:
    return None if function is None else inspect.signature(function).parameters[name].default


def _required(function: Callable[..., Any] | None) -> list[str]:
    if function is None:
        return []
    given = inspect.signature(function).parameters.values()
    return [p.name for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
