"""Shapes and types are checked while the tests run: annotations of the rooms below are executed at every call.

`beartype` looks at arguments and results, `jaxtyping` at shapes and dtypes; an axis letter (`specmd_jax/types.py`) must
mean one size within a call. Records (NamedTuples and dataclasses of arrays) are looked into, which neither does by
itself: JAX builds them of anything while it maps over them, so they are checked where a function takes or gives one,
and not where they are made. A record in `Annotated` is one whose axes are its own: it is not looked into. None
where an array belongs means that nobody knows it: who reads it fails anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Union, get_args, get_origin, get_type_hints

from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from jaxtyping import AbstractArray, install_import_hook

ROOMS = (
    "specmd_jax.policies",
    "specmd_jax.replay.demand",
    "specmd_jax.replay.host_room",
    "specmd_jax.replay.host_tier",
    "specmd_jax.replay.make_room",
    "specmd_jax.replay.pinning",
    "specmd_jax.replay.prefetching",
    "specmd_jax.replay.reading_ahead",
    "specmd_jax.replay.routing",
    "specmd_jax.replay.serving",
    "specmd_jax.replay.sharing",
    "specmd_jax.replay.spending",
    "specmd_jax.replay.state",
    "specmd_jax.replay.step",
    "specmd_jax.replay.storage",
    "specmd_jax.replay.timing",
    "specmd_jax.replay.totals",
    "specmd_jax.schedule.build",
    "specmd_jax.schedule.demand",
    "specmd_jax.schedule.passes",
)
"""Packages and modules whose annotations are executed. Modules of kernels (numba) are not among them: what numba
compiles must be the function itself.
"""

CONF = BeartypeConf(is_pep484_tower=True)  # an int will do for a float


def install() -> None:
    """Checks every call in `ROOMS` from here on; before they are imported."""
    install_import_hook(ROOMS, f"{__name__}.checked")


_made: dict[tuple[Any, ...], Callable[..., Any]] = {}  # by what a function's checks follow from


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its arguments and its result checked, records field by field.

    `jaxtyping` gives an empty function of the same signature to be checked in place of the real one, and a policy's
    functions anew each time the policy is built. What is checked follows from the signature alone: one does for all.
    Hints are told apart by what they say: `jaxtyping` makes new ones, which are not equal, of the same words.
    """
    if function.__defaults__ or function.__kwdefaults__:
        return _checked(function)
    key = (function.__module__, function.__qualname__, function.__code__, repr(function.__annotations__))
    if key not in _made:
        _made[key] = _checked(function)
    return _made[key]


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    bare = beartype(conf=CONF)(function)
    records = {name: hint for name, hint in function.__annotations__.items() if any(_records(hint))}
    if not records:
        return bare
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = bare(*args, **kwargs)
        values = {**signature.bind(*args, **kwargs).arguments, "return": result}
        for name, hint in records.items():
            for record in _records(hint):
                if name in values and type(values[name]) is record:
                    _look_into(values[name], name)
        return result

    return wrapped


def _records(hint: Any) -> Iterator[type]:
    """Records that a hint allows: itself, or members of a union."""
    for part in get_args(hint) if get_origin(hint) is Union or type(hint).__name__ == "UnionType" else (hint,):
        if isinstance(part, type) and (hasattr(part, "_fields") or dataclasses.is_dataclass(part)):
            yield part


@functools.cache
def _fields(record: type) -> dict[str, Any]:
    """Fields that say a shape, or are records themselves; sums such as V+1 behind what they are made of."""
    hints = get_type_hints(record, include_extras=True).items()
    found = {name: hint for name, hint in hints if _shaped(hint) or any(_records(hint))}
    return dict(sorted(found.items(), key=lambda item: "+" in str(item[1])))


def _shaped(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_shaped, get_args(hint)))


def _look_into(record: Any, where: str) -> None:
    for name, hint in _fields(type(record)).items():
        value, path = getattr(record, name), f"{where}.{name}"
        if any(_records(hint)):
            if value is not None:
                _look_into(value, path)
        elif value is not None and not is_bearable(value, hint):
            found = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else repr(value)
            raise TypeError(f"{path} is {found}, expected {hint}")
