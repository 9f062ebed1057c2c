"""Options of the command line from the fields of `specmd_jax.Setting`, and the setting from them.

A field's name, type and default are the dataclass's, and its help is the text below it there. All of it is read from
the source, as the class itself brings JAX.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from typing import Any, NamedTuple

from configs.offload import numbers
from configs.tables import keys_of, source_of
from experiments.common.options import items, shown

AXES = {
    "eviction": "EVICTION",
    "prefetch": "PREFETCH",
    "selection": "SELECTION",
    "miss": "MISS",
    "routing": "ROUTING",
    "admission": "ADMISSION",
    "host_eviction": "EVICTION",
}
"""Fields that name a policy, and the table of its names."""
HOMES = {"SELECTION": "prefetch"}
"""Modules of `specmd_jax.policies` that have a table under another name than their own."""


class Field(NamedTuple):
    """A field of `Setting` as its source has it."""

    name: str
    type: str
    default: Any
    text: str  # below it, as one line without its full stop


def setting_options(parser: argparse._ActionsContainer) -> None:
    """Adds an option for each field of `Setting`; `--numbers` has those of the policies."""
    for one in setting_fields():
        known = f"; one of: {', '.join(policies(one.name))}" if one.name in AXES else ""
        usual = "none" if one.default is None else shown(one.default) or "the policies'"
        text = one.text or f"the {one.name} policy"
        help = f"{text[0].lower()}{text[1:]}{known} (default: {usual})".replace("%", "%%")
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if not isinstance(one.default, bool):
            read, metavar = READERS.get(one.type.removesuffix(" | None"), (str, "TEXT"))
            how = {"type": read, "metavar": "NAME" if one.name in AXES else metavar}
        parser.add_argument(f"--{one.name.replace('_', '-')}", dest=one.name, default=None, help=help, **how)


def policies(axis: str) -> tuple[str, ...]:
    """Gives the names of an axis's policies."""
    table = AXES[axis]
    names = keys_of(f"specmd_jax.policies.{HOMES.get(table, table.lower())}", table)
    return ("none", *names) if axis == "host_eviction" else names


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Gives the fields that the options say, for `specmd_jax.setting.make_setting`."""
    asked = {one.name: getattr(args, one.name) for one in setting_fields()}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if value == "none" and name not in AXES:  # a prefetch policy has this name
            given[name] = None
    given["numbers"] = dict(given.get("numbers", ()))
    return given


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in items(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers with commas between") from None


READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "N"),
    "float": (float, "X"),
    "Sequence[float]": (_floats, "X,X"),
    "Mapping[str, Any]": (numbers, "A=1,B=2"),
}
"""How a field is read, by its annotation; all others are text, which `Setting` reads."""


def setting_fields() -> list[Field]:
    """Gives the fields of `Setting`, in its order."""
    found: list[Field] = []
    tree = source_of("specmd_jax.setting")
    of_class = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Setting")
    for line in of_class.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            default = line.value.value if isinstance(line.value, ast.Constant) else ()  # made for each setting: empty
            found.append(Field(line.target.id, ast.unparse(line.annotation), default, ""))
        elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and found and not found[-1].text:
            text = " ".join(str(line.value.value).split()).removesuffix(".").replace("None", "none")
            found[-1] = found[-1]._replace(text=text)
        elif isinstance(line, ast.FunctionDef):
            break
    numbers_text = "numbers of the policies; each goes to those that take it"
    return [one._replace(text=numbers_text) if one.name == "numbers" else one for one in found]
