"""How settings are declared: once, with their default, their meaning and what they may be.

The fields of a study's `Settings` are `option(...)` (one on the command line, too), `fixed(...)` (settings that the
command line leaves alone) or have `parts` (settings of another module). `experiments.common.options` makes the command
line of them. Tables of names are looked up when they are needed, so that settings import no JAX.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from configs.tables import keys_of
from specmd_jax.errors import SpecmdError, find
from specmd_jax.reference import REFERENCE
from specmd_jax.specs.capacity import parse_capacity

T = TypeVar("T")
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Names:
    """A table of names, and the module that has it."""

    kind: str  # as an error calls one of them
    module: str = ""
    table: str = ""
    suffix: str = ""  # of files that may stand in for a name, such as ".npz"
    also: tuple[str, ...] = ()  # names besides those in the table
    holds: str = ""  # a file that a folder must have to stand in for a name
    mark: str = ""  # before numbers that may follow a name, such as "preset:number=1"
    written: bool = True  # name by name in the source of the module, which then need not be imported

    def known(self) -> tuple[str, ...]:
        """Gives all names."""
        if not self.module:
            return self.also
        if self.written:
            return *self.also, *keys_of(self.module, self.table)
        table: Any = getattr(import_module(self.module), self.table)
        names: Any = table() if callable(table) else table
        return (*self.also, *names)

    def find(self, name: str) -> str:
        """Gives `name` as the table spells it, or the path of a file or folder; raises `SpecmdError` for others."""
        if self.mark and self.mark in name and not name.lower().endswith(self.suffix or "\0"):
            name, mark, numbers = name.partition(self.mark)
            return self.find(name) + mark + numbers
        try:
            return find(self.kind, name, self.known())
        except SpecmdError:
            named = bool(self.suffix) and name.lower().endswith(self.suffix)
            if self.holds and not named and (os.path.exists(name) or Path(name).name != name):
                return folder(name, self.holds)
            if not self.suffix or not (Path(name).suffix or os.path.exists(name)):
                raise
        if not os.path.isfile(name):
            raise SpecmdError(f"{name}: no such file")
        return name


EVICTIONS = Names("eviction policy", "specmd_jax.policies.eviction", "EVICTION")
PREFETCHES = Names("prefetch policy", "specmd_jax.policies.prefetch", "PREFETCH")
MISS_RULES = Names("miss policy", "specmd_jax.policies.miss", "MISS")
ROUTINGS = Names("routing policy", "specmd_jax.policies.routing", "ROUTING")
HARDWARE = Names("hardware", "specmd_jax.specs.machines", "COMPOSED", ".json", mark=":")
MODELS = Names("model", "specmd_jax.specs.models", "MODELS", ".json", holds="config.json", written=False)
TRACES = Names("trace", "specmd_jax.trace.bundled", "BUNDLED", ".npz")
BUNDLED = Names("bundled trace", "specmd_jax.trace.bundled", "BUNDLED")
ADMISSIONS = Names("admission policy", "specmd_jax.policies.admission", "ADMISSION")
SCOPES = Names("scope", "specmd_jax.specs.capacity", "SCOPES")
CONTRACTS = Names("contract", "specmd_jax.schedule.build", "CONTRACTS")
PHASES = Names("phase", "specmd_jax.schedule.build", "PHASES")
PRECISIONS = Names("precision", "specmd_jax.moe.model.quant", "BITS", also=("native",))
SHAPES = Names("published model", "configs.tables", "runnable_models", also=("tiny",), written=False)
WEIGHTS = Names(
    "published model",
    "configs.tables",
    "runnable_models",
    also=(REFERENCE, "tiny"),
    holds="config.json",
    written=False,
)
UNITS = Names("unit of a split", "specmd_jax.learn.splits", "UNITS")


@dataclass(frozen=True)
class Setting:
    """What is known of one field besides its type and default."""

    help: str
    names: Names | None = None
    least: float | None = None
    above: float | None = None
    below: float | None = None
    check: Callable[[Any], object] | None = None  # of each value; raises SpecmdError
    may_be_empty: bool = False  # a list that may be given without any items
    option: bool = False
    shown: str = ""  # the default in words, where its value would not say it
    metavar: str = ""
    alias: str = ""  # another name of the option
    read: Callable[[str], Any] | None = None  # text -> value, where the type does not say it; raises ValueError
    repeated: bool = False  # a list whose option may be given several times: their items follow each other

    def checked(self, name: str, value: Any, default: Any) -> Any:
        """Gives the value with names as their table spells them; raises `SpecmdError` if it is out of range."""
        if isinstance(value, tuple):
            if not value and default and not self.may_be_empty:
                raise SpecmdError(f"{name} is empty, expected at least one")
            items = [self.checked(name, item, None) for item in value]
            return tuple(items if self.names is None else dict.fromkeys(items))  # a name given twice counts once
        if isinstance(value, str) and self.names is not None:
            value = self.names.find(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_range(name, value)
        if self.check is not None and value is not None:
            self.check(value)
        return value

    def _check_range(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise SpecmdError(f"{name} is {value}, expected a finite number")
        if self.least is not None and value < self.least:
            raise SpecmdError(f"{name} is {value}, expected at least {self.least:g}")
        if self.above is not None and value <= self.above:
            raise SpecmdError(f"{name} is {value}, expected above {self.above:g}")
        if self.below is not None and value >= self.below:
            raise SpecmdError(f"{name} is {value}, expected below {self.below:g}")


def option(default: T, help: str, **more: Any) -> T:
    """Declares a field that is also an option of the command line; `more` are fields of `Setting`."""
    return field(default=default, metadata={"setting": Setting(help, option=True, **more)})


def fixed(default: T, help: str, **more: Any) -> T:
    """Declares a field that is no option of the command line; `more` are fields of `Setting`."""
    return field(default=default, metadata={"setting": Setting(help, **more)})


def parts(options: Mapping[str, Setting]) -> dict[str, Any]:
    """Gives ``metadata=`` of a field that holds a dataclass with a ``check()``: the fields that are options."""
    return {"parts": options}


@dataclass(frozen=True)
class Settings:
    """What the settings of every study have in common."""

    def smoke(self) -> Settings:
        """Gives the same study in seconds."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises `SpecmdError` for settings that do not go together, or that a study has its own rules for."""

    def checked(self: S) -> S:
        """Gives the same settings with names as their tables spell them; raises `SpecmdError` for bad ones."""
        found = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if "setting" in one.metadata:
                found[one.name] = one.metadata["setting"].checked(one.name, value, one.default)
            else:
                value.check()
        result = replace(self, **found)
        result.check()
        return result


def folder(path: str, holds: str = "config.json") -> str:
    """Gives the path of a folder that has the file ``holds``; raises `SpecmdError` for others."""
    if not os.path.isfile(Path(path) / holds):
        raise SpecmdError(f"{path}: no {holds} there, expected the folder of a checkpoint")
    return path


def capacity(text: str) -> None:
    """Raises `SpecmdError` unless `text` is a capacity; whether it holds an expert depends on the model."""
    parse_capacity(text, expert_bytes=[1], experts=1 << 40, top_k=1 << 30)


def machine(name: str) -> None:
    """Raises `SpecmdError` for the name or file of no machine, and for a file that cannot be read."""
    from specmd_jax.specs.hardware import hardware  # brings JAX

    hardware(name)


def profile(source: str) -> None:
    """Raises `SpecmdError` for what is neither empty nor a profile, a trace or the name of a bundled one."""
    from specmd_jax.trace.profile import as_profile  # brings the readers of all formats

    if source:
        as_profile(source)


def share(value: float) -> None:
    """Raises `SpecmdError` for a share above 1."""
    if value > 1:
        raise SpecmdError(f"a share of {value:g} is more than everything, expected 0 up to 1")


def numbers(items: tuple[str, ...], kind: str, known: Iterable[str]) -> dict[str, float]:
    """Reads ``name=number`` items; raises `SpecmdError` for what is none, and for a name that is not ``known``."""
    found = {}
    for item in items:
        name, _, text = item.partition("=")
        key = find(kind, name, known)
        try:
            found[key] = float(text)
        except ValueError:
            raise SpecmdError(f"{item!r} has no number, expected such as {key}=1e-5") from None
    return found


def tokens(text: str) -> int:
    """Reads a number of tokens such as 4096, 32k or 1M, by 1024; raises `ValueError`."""
    times = {"k": 1024, "m": 1024**2}.get(text[-1:].lower())
    return int(text) if times is None else round(float(text[:-1]) * times)


def size(text: str) -> int:
    """Reads bytes with a unit, or 0; raises `SpecmdError`."""
    if any(sign in text for sign in ("%", "slot", "cycle")):
        raise SpecmdError(f"{text!r}: expected bytes, such as 6GiB or 500MB")
    return 0 if text.strip() == "0" else int(parse_capacity(text, expert_bytes=[1], experts=1, top_k=1))
