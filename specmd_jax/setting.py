"""A `Setting` says everything about a cell: policies, cache, schedule and machine. `grid` makes many."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from specmd_jax.errors import SpecmdError, find, unknown
from specmd_jax.policies.choice import AXES, Choice, Chosen, Mix, choose
from specmd_jax.policies.pins import pinned
from specmd_jax.replay.state import Tier
from specmd_jax.schedule.build import CONTRACTS, PHASES, check_options
from specmd_jax.schedule.drafts import Drafts, check_drafts
from specmd_jax.specs.capacity import SCOPES, Budget, Capacity, parse_capacity
from specmd_jax.specs.hardware import HARDWARE, Hardware, with_storage
from specmd_jax.specs.hardware import hardware as find_hardware
from specmd_jax.trace.profile import Profile, ProfileSource, as_profile
from specmd_jax.types import Trace

OVERSIZE = ("stream", "hold")
MOST_CONTEXT = 1 << 30
HEARS = ("misses", "uses")
INCLUSION = ("inclusive", "exclusive")
PREFETCH_TO = ("device", "host")


@dataclass(frozen=True)
class Setting:
    """Everything that defines a cell.

    A policy is a name in the tables of `specmd_jax.policies`, a function that returns a policy (its numbers bound by
    `functools.partial` or given in `numbers`), or a policy that is built.

    Raises SpecmdError for a name that no table knows, or a number that no trace could serve.
    """

    eviction: Chosen = "lru"
    capacity: Capacity = "25%"
    """Bytes, or text such as "4000MiB", "25%", "51 slots", "12 slots/layer", "1.5 cycles"."""
    scope: str = "global"
    """"global" (one pool) or "layer" (a quota for each layer)."""
    contract: str = "event"
    """"event", "sequential" or "sequential-id" (CONTRACT.md section 1)."""
    hardware: str | Hardware | None = "pcie4-x16"
    """A preset's name, a preset file, a `Hardware`, or None for no seconds."""
    batch: int = 1
    """Requests that are decoded together."""
    reset_per_request: bool = False
    """Whether the cache, and what the policies remember, is emptied before each request."""
    phase: str = "all"
    """Which passes are counted: "all", "prefill" or "decode"."""
    warmup_tokens: int = 0
    """How many tokens at the beginning are not counted."""
    prefetch: Chosen = "none"
    selection: Chosen = "topk"
    """Which of the predicted experts are asked for."""
    overfetch: float = 1.0
    """`topk` asks for top-k x overfetch experts of each layer."""
    percentile: float = 80.0
    """`percentile` asks for all experts that score above this percentile."""
    horizon: int = 1
    """How many layers ahead are predicted, 1..L-1."""
    may_evict: bool = True
    """Whether a prefetch may push something out."""
    miss: Chosen = "fetch"
    routing: Chosen = "standard"
    precisions: Sequence[float] | None = None
    """Stored precisions of every expert in ascending bits; None: as the trace says."""
    oversize: str = "stream"
    """A demand larger than the cache passes through ("stream") or stays until the next visit ("hold")."""
    prefill_chunk: int | None = None
    """Tokens of a prefill pass; None: a prompt is one pass."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the policies by name, such as {"decay": 0.95}; each goes to the policies that take it."""
    context: int = 0
    """Tokens that each request of a decode pass attends to, in a model whose attention is known; 0: none are read."""
    warm_start: ProfileSource | None = None
    """The cache begins, and begins anew, with the most used experts of a profile (of other requests); None: empty."""
    pin_share: float = 0.0
    """The share of each pool whose experts, the most used of `pin_profile`, never leave: as `policies.pins.pinned`."""
    pin_profile: ProfileSource | None = None
    """What `pin_share` keeps; None: the experts of `warm_start`."""
    admission: Chosen = "always"
    """Which demand copies stay in the cache: "always", "compete", "limited", "margin" (CONTRACT.md section 2)."""
    drafts: int = 0
    """Speculative decoding: tokens that are drafted for each decode pass, which verifies them. 0: none."""
    acceptance: float | None = None
    """Probability that a draft is accepted if those before it were; None: the trace has accepted counts."""
    draft_seed: int = 0
    """What accepted drafts are drawn from."""
    draft_s: float = 0.0
    """Seconds of drafting before each decode pass."""
    host_capacity: Capacity | None = None
    """How much of host memory is for experts, as `capacity`; what is not there comes from storage. None: all are."""
    host_scope: str = "global"
    """As `scope`, of host memory."""
    host_eviction: Chosen = "lru"
    """Which expert leaves host memory first. It takes its numbers from `numbers`, too."""
    host_hears: str = "misses"
    """What the policy of host memory hears: the device's "misses", or all "uses"."""
    inclusion: str = "inclusive"
    """"inclusive": what moves to the device stays in host memory; "exclusive": it leaves, and what the device evicts
    enters."""
    storage: str | Hardware | None = None
    """The storage behind host memory: a machine whose link it is, such as "nvme-4"; None: as `hardware` says."""
    prefetch_to: str = "device"
    """Where what is foreseen goes: to the "device", or from storage to the "host" alone, so that a miss is no read."""

    def __post_init__(self) -> None:
        for name in ("batch", "horizon", "warmup_tokens", "prefill_chunk", "context"):
            _whole(name, getattr(self, name))
        for name in ("reset_per_request", "may_evict"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise SpecmdError(f"{name} is {getattr(self, name)!r}, expected True or False")
        tables = (
            ("scope", SCOPES), ("oversize", OVERSIZE), ("contract", CONTRACTS), ("phase", PHASES),
            ("host_scope", SCOPES), ("host_hears", HEARS), ("inclusion", INCLUSION),
            ("prefetch_to", PREFETCH_TO),
        )  # fmt: skip
        for name, known in tables:
            object.__setattr__(self, name, find(name, getattr(self, name), known))  # as the table spells it
        check_drafts(Drafts(self.drafts, self.acceptance, self.draft_seed, self.draft_s))
        apart = ("batch", "precisions", "context")
        check_options(self.batch, **{k: v for k, v in self.schedule.items() if k not in apart})
        if not 0 <= self.context <= MOST_CONTEXT:
            raise SpecmdError(f"context is {self.context}, expected 0 to {MOST_CONTEXT} tokens")
        if not 0 < _number("overfetch", self.overfetch) < float("inf"):
            raise SpecmdError(f"overfetch is {self.overfetch}, expected above 0")
        if not 0 <= _number("percentile", self.percentile) < 100:
            raise SpecmdError(f"percentile is {self.percentile}, expected 0 up to, but not including, 100")
        if not isinstance(self.numbers, Mapping):
            raise SpecmdError(f"numbers is {self.numbers!r}, expected numbers of the policies by name")
        for name in ("warm_start", "pin_profile"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_profile(getattr(self, name), name))
        if not 0 <= _number("pin_share", self.pin_share) <= 1:
            raise SpecmdError(f"pin_share is {self.pin_share}, expected 0 up to 1")
        if self.pin_share and self.pinned_profile is None:
            raise SpecmdError(f"pin_share is {self.pin_share} without a profile, expected pin_profile or warm_start")
        for axis, choice in self._named().items():
            if isinstance(getattr(self, axis), str):
                object.__setattr__(self, axis, choice.name)
        for name in ("hardware", "storage"):
            named = getattr(self, name)
            if isinstance(named, str) and named.casefold() in HARDWARE:
                object.__setattr__(self, name, find(name, named, HARDWARE))
        self._check_host()
        _ = self.machine
        if self.pin_share:
            self.choices()  # refuses pins on top of pins

    def _check_host(self) -> None:
        """Refuses host memory that nothing evicts from, and storage behind it whose speed nobody knows."""
        if self.host_capacity is None:
            if self.prefetch_to == "host":
                raise SpecmdError("prefetch_to is 'host' without a host_capacity, expected one, such as '64GiB'")
            return
        if self.host_eviction is None or self.host_eviction == "none":
            raise SpecmdError("host_eviction is none with a host_capacity, expected an eviction policy, such as 'lru'")
        machine = self.machine
        if machine is None or self.storage is not None or _traced(machine):
            return
        if not np.isfinite(machine.storage_bytes_per_s).all():
            raise SpecmdError(
                "host_capacity needs the rate of the storage behind it: expected storage='nvme-4' or the like, or "
                "hardware with a finite storage_bytes_per_s; storage='infinite' costs nothing"
            )

    # ------------------------------------------------------------------------------------------------ what it means

    @property
    def pinned_profile(self) -> Profile | None:
        """What `pin_share` keeps."""
        profile = self.warm_start if self.pin_profile is None else self.pin_profile
        return None if profile is None else as_profile(profile)

    @property
    def profiles(self) -> list[Profile]:
        """What is known of the routing before it begins: by a warm start, and by pins."""
        pins = self.choices()["eviction"].build().pins
        known = [self.warm_start, None if pins is None else pins.profile]
        return list(dict.fromkeys(as_profile(profile) for profile in known if profile is not None))

    def choices(self) -> dict[str, Choice]:
        """Gives the policy of each axis, with the numbers it takes. Raises SpecmdError for a number that none takes."""
        found, profile = self._named(), self.pinned_profile
        if self.pin_share and profile is not None:
            found["eviction"] = pinned(found["eviction"], self.pin_share, profile=profile)
        return found

    def _named(self) -> dict[str, Choice]:
        """Gives the policies as the fields name them, with their numbers."""
        found = {axis: choose(axis, getattr(self, axis)) for axis in AXES}
        for name in self.numbers:
            if not any(name in choice.accepted for choice in found.values()):
                every = {number for choice in found.values() for number in choice.accepted}
                raise unknown("policy number", name, every or {"none of these policies takes a number"})
        return {
            axis: choice.having({k: v for k, v in self.numbers.items() if k in choice.accepted})
            for axis, choice in found.items()
        }

    def mix(self, top_k: int) -> Mix:
        """Gives the policies for a model that routes each token to `top_k` experts."""
        found = self.choices()
        asked = {"count": top_k * self.overfetch, "percentile": self.percentile}
        selection = found["selection"]
        mine = {k: v for k, v in asked.items() if k in selection.accepted and k not in self.numbers}
        if self.host_capacity is None:
            found["host_eviction"] = choose("host_eviction", None)
        mix = Mix(**{**found, "selection": selection.having(mine)})
        mix.declared()  # a text among the settings may be unknown to its policy
        return mix

    @property
    def machine(self) -> Hardware | None:
        """The hardware; None: no seconds."""
        if isinstance(self.hardware, Hardware) and _traced(self.hardware):
            return self.hardware  # a study goes over its numbers: they cannot be looked at
        if self.hardware is None:
            return None
        return find_hardware(self.hardware) if self.storage is None else with_storage(self.hardware, self.storage)

    def budget(self, trace: Trace) -> Budget:
        """Gives the capacity as a budget in bytes for this trace (its head is enough)."""
        return parse_capacity(
            self.capacity, expert_bytes=trace.expert_bytes, experts=trace.experts, top_k=trace.top_k, scope=self.scope
        )

    def host_budget(self, trace: Trace) -> Budget | None:
        """Gives the capacity of host memory as a budget in bytes; None: it holds everything.

        Raises SpecmdError if it is less than what the device holds, of which it keeps a copy unless it is exclusive.
        """
        if self.host_capacity is None:
            return None
        sizes = {"expert_bytes": trace.expert_bytes, "experts": trace.experts, "top_k": trace.top_k}
        try:
            host = parse_capacity(self.host_capacity, scope=self.host_scope, **sizes)
        except SpecmdError as error:
            raise SpecmdError(f"host_{error}") from None
        everything = int(np.sum(trace.expert_bytes, dtype=np.int64)) * trace.experts
        device_bytes, host_bytes = min(int(np.sum(self.budget(trace))), everything), int(np.sum(host))
        if self.inclusion == "inclusive" and host_bytes < device_bytes:
            raise SpecmdError(
                f"host_capacity is {host_bytes} bytes, less than the resident set of the device ({device_bytes} "
                "bytes), of which host memory keeps a copy: expected at least that, or inclusion='exclusive'"
            )
        return host

    @property
    def schedule(self) -> dict[str, Any]:
        """What decides the visits and the sizes: arguments of `engines.prepared.prepare`."""
        bits = None if self.precisions is None else tuple(float(b) for b in self.precisions)
        names = ("contract", "batch", "reset_per_request", "phase", "warmup_tokens", "prefill_chunk", "context")
        drafts = Drafts(self.drafts, self.acceptance, self.draft_seed, self.draft_s) if self.drafts else None
        return {"precisions": bits, **{name: getattr(self, name) for name in names}, "drafts": drafts}

    @property
    def options(self) -> dict[str, Any]:
        """The rest of what decides the program: options of `replay.state.Setup`."""
        options = {"hold": self.oversize == "hold", "horizon": self.horizon, "may_evict": self.may_evict}
        if self.host_capacity is not None:
            options["tier"] = Tier(
                uses=self.host_hears == "uses",
                exclusive=self.inclusion == "exclusive",
                to_host=self.prefetch_to == "host",
            )
        return options | ({} if self.warm_start is None else {"warm_start": self.warm_start})

    def replace(self, **changes: Any) -> Setting:
        """Changes some fields, or numbers of its policies, in a copy; raises SpecmdError for what is neither."""
        return make_setting(self, **changes)

    def row(self) -> dict[str, Any]:
        """Gives every field but the capacities, which have columns of their own, as a plain value; policies by name."""
        apart = ("capacity", "host_capacity", "numbers")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        plain |= {axis: choose(axis, getattr(self, axis)).name for axis in AXES}
        for name in ("hardware", "storage"):
            if isinstance(plain[name], Hardware):
                plain[name] = "custom"
        for name in ("warm_start", "pin_profile"):
            profile = plain[name]
            plain[name] = profile.source if isinstance(profile, Profile) else None
        if self.precisions is not None:
            plain["precisions"] = ":".join(f"{bits:g}" for bits in self.precisions)
        return plain | {name: _plain(value) for name, value in self.numbers.items()}


FIELDS = tuple(f.name for f in fields(Setting))


def make_setting(setting: Setting | None = None, /, **given: Any) -> Setting:
    """Makes a setting of fields and of numbers of its policies by name, from the defaults or from `setting`.

    Raises SpecmdError for a name that is neither a field nor a number of one of the policies, and suggests the nearest.
    """
    known = {name: value for name, value in given.items() if name in FIELDS}
    numbers = {name: value for name, value in given.items() if name not in FIELDS}
    base = Setting() if setting is None else setting
    for name in numbers:
        if difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.75) and not _is_number_name(name):
            raise unknown("setting", name, FIELDS)
    if numbers:
        known["numbers"] = {**base.numbers, **known.get("numbers", {}), **numbers}
    return dataclasses.replace(base, **known)


def grid(setting: Setting | None = None, /, **axes: Any) -> list[Setting]:
    """Makes the settings of a grid: every combination of the given values, the first field of `Setting` slowest.

    A list, tuple, range or one-dimensional array is an axis; anything else is one value for all. Names are fields of
    `Setting`, or numbers of policies, which come last: `grid(eviction=["lru", "lfu_decay"], decay=np.linspace(0.5, 1))`
    varies `decay` where the policies take it, and has one setting where they do not.

    Args:
      setting: what is not varied; None: the defaults.
      axes: values by name. `precisions` takes ascending bits as one value, and a list of those as an axis; `capacity`
        takes the bytes of each layer as an array inside a list.

    Raises:
      SpecmdError: an empty axis, a name that nobody knows, or a number that no combination takes.
    """
    names = [*(name for name in FIELDS if name in axes), *(name for name in axes if name not in FIELDS)]
    values = {name: _values(name, axes[name]) for name in names}
    numbers = [name for name in names if name not in FIELDS]
    found: list[Setting] = []
    taken: set[str] = set()
    for chosen in product(*(values[name] for name in names if name in FIELDS)):
        base = make_setting(setting, **dict(zip((name for name in names if name in FIELDS), chosen, strict=True)))
        accepted = {number for choice in base.choices().values() for number in choice.accepted}
        mine = [name for name in numbers if name in accepted]
        taken.update(mine)
        for point in product(*(values[name] for name in mine)):
            found.append(make_setting(base, **dict(zip(mine, point, strict=True))))
    for name in numbers:
        if name not in taken:
            make_setting(found[0], **{name: values[name][0]})  # says which names there are
    return found


def _values(name: str, given: Any) -> list[Any]:
    """Gives the values of an axis."""
    if name == "precisions" and isinstance(given, Sequence) and given and not isinstance(given[0], Sequence | None):
        return [given]
    if isinstance(given, np.ndarray) and given.ndim > 1:
        raise SpecmdError(f"{name} has shape {given.shape}, expected a list of values")
    if isinstance(given, tuple) and hasattr(given, "_fields"):  # a built policy
        return [given]
    if isinstance(given, list | tuple | range) or (isinstance(given, np.ndarray) and given.ndim == 1):
        values = [value.item() if isinstance(value, np.generic) else value for value in given]
        if not values:
            raise SpecmdError(f"{name} is empty, expected at least one value")
        return values
    return [given]


def _whole(name: str, value: Any) -> None:
    optional = name == "prefill_chunk" and value is None
    if not optional and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
        raise SpecmdError(f"{name} is {value!r}, expected a whole number")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise SpecmdError(f"{name} is {value!r}, expected a number")
    return float(value)


def _is_number_name(name: str) -> bool:
    """Whether some policy of the tables takes a number of this name."""
    return any(name in choose(axis, row).accepted for axis, about in AXES.items() for row in about.table)


def _traced(machine: Hardware) -> bool:
    """Whether a number of the machine is being traced."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(machine))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
