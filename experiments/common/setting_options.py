"""Options of the command line from the fields of `specmd_jax.Setting`, and the setting from them.

A field's name, type and default are the dataclass's, and its help is the text below it there.
"""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from textwrap import dedent
from typing import Any

from configs.offload import numbers
from experiments.common.options import items, shown
from specmd_jax.policies.choice import AXES
from specmd_jax.setting import Setting, make_setting


def setting_options(parser: argparse._ActionsContainer) -> None:
    """Adds an option for each field of `Setting`; `--numbers` has those of the policies."""
    texts = _texts()
    for one in fields(Setting):
        default = () if one.default is MISSING else one.default
        known = f"; one of: {', '.join(AXES[one.name].table)}" if one.name in AXES else ""
        usual = "none" if default is None else shown(default) or "the policies'"
        text = texts.get(one.name, f"the {one.name} policy")
        help = f"{text[0].lower()}{text[1:]}{known} (default: {usual})".replace("%", "%%")
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if not isinstance(default, bool):
            read, metavar = READERS.get(str(one.type).removesuffix(" | None"), (str, "TEXT"))
            how = {"type": read, "metavar": "NAME" if one.name in AXES else metavar}
        parser.add_argument(f"--{one.name.replace('_', '-')}", dest=one.name, default=None, help=help, **how)


def setting_of(args: argparse.Namespace) -> Setting:
    """Gives the setting that the options say. Raises `SpecmdError` with one line."""
    asked = {one.name: getattr(args, one.name) for one in fields(Setting)}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if value == "none" and name not in AXES:  # a prefetch policy has this name
            given[name] = None
    given["numbers"] = dict(given.get("numbers", ()))
    return make_setting(**given)


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


def _texts() -> dict[str, str]:
    """Gives the text below each field of `Setting`, as one line without its full stop."""
    (of_class,) = ast.parse(dedent(inspect.getsource(Setting))).body
    assert isinstance(of_class, ast.ClassDef)
    found: dict[str, str] = {}
    name = None
    for line in of_class.body:
        if name is not None and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            found[name] = " ".join(str(line.value.value).split()).removesuffix(".").replace("None", "none")
        name = line.target.id if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) else None
    return found | {"numbers": "numbers of the policies; each goes to those that take it"}
