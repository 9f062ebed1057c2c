"""Combinators of eviction policies: some experts never leave, and any policy has the rest of the cache.

What is kept comes from a profile. It should count other requests than those that are replayed: a profile of the
replayed ones knows the future.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from specmd_jax.errors import SpecmdError
from specmd_jax.policies.base import Eviction, Pins
from specmd_jax.policies.choice import Choice, Chosen, choose
from specmd_jax.policies.eviction import lru
from specmd_jax.policies.numbers import Share
from specmd_jax.trace.profile import Profile, ProfileSource, as_profile

SHARE = "share"


def pinned(policy: Chosen = "lru", share: Any = 0.5, *, profile: ProfileSource) -> Choice:
    """Keeps the experts with the largest counts for good, as far as they fit in `share` of each pool (CONTRACT.md).

    Args:
      policy: any eviction policy, in any form that a `Setting` takes; it has the rest of the pool.
      share: 0 to 1, a number of the policy: it can be swept and traced.
      profile: a `Profile`, a trace, or the path of a file of either.

    Raises:
      SpecmdError: no eviction policy, one with pins of its own, a bad share or profile.
    """
    inner = choose("eviction", policy)
    if inner.build().pins is not None:
        raise SpecmdError(f"eviction {inner.name!r} keeps some experts already, expected a policy without pins")
    assert inner.factory is not None  # something always happens on this axis
    made = _with_pins(inner.factory, as_profile(profile))
    return Choice("eviction", f"pinned({inner.name})", made, inner.texts, inner.numbers).having({SHARE: share})


def static(profile: ProfileSource) -> Choice:
    """Keeps the experts with the largest counts that the cache holds; nothing is ever exchanged for them."""
    return pinned(lru, 1.0, profile=profile)


@functools.lru_cache(maxsize=256)
def _with_pins(inner: Callable[..., Eviction], profile: Profile) -> Callable[..., Eviction]:
    """Gives the function that builds the policy; the same one for the same arguments, so that it is compiled once."""

    def made(share: Share = 0.5, **settings: Any) -> Eviction:
        return inner(**settings)._replace(pins=Pins(share, profile))

    own = inspect.signature(inner).parameters
    mine = inspect.Parameter(SHARE, inspect.Parameter.KEYWORD_ONLY, default=0.5)
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()]
    made.__signature__ = inspect.Signature([*parameters, mine])  # pyright: ignore[reportFunctionMemberAccess]
    try:
        hints = get_type_hints(inner, include_extras=True) if inspect.isfunction(inner) else {}
    except NameError:  # as for any policy: annotations that only a type checker can read declare no range
        hints = {}
    made.__annotations__ = {**hints, SHARE: Share}
    return made
