"""Options of the command line from the fields of `specmd_jax.Setting`, and the setting from them.

A field's name, type and default are the dataclass's, and its help is the text below it there.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from textwrap import dedent
from typing import Any, Union, get_args, get_origin, get_type_hints

from configs.offload import numbers
from experiments.common.options import items, shown
from specmd_jax.policies.choice import AXES
from specmd_jax.setting import Setting, make_setting


def setting_options(parser: argparse._ActionsContainer) -> None:
    """Adds an option for each field of `Setting`, and `--numbers` for those of the policies."""
    texts, hints = _texts(), get_type_hints(Setting)
    for one in fields(Setting):
        default = one.default if one.default is not MISSING else ()
        known = f"; one of: {', '.join(AXES[one.name].table)}" if one.name in AXES else ""
        value = "the policies'" if one.name == "numbers" else "none" if default is None else shown(default)
        help = f"{texts.get(one.name, f'the {one.name} policy')}{known} (default: {value})".replace("%", "%%")
        flag = f"--{one.name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, dest=one.name, default=None, help=help, action=argparse.BooleanOptionalAction)
        else:
            read, metavar = _reader(hints[one.name]) if one.name not in AXES else (str, "NAME")
            parser.add_argument(flag, dest=one.name, default=None, help=help, type=read, metavar=metavar)


def setting_of(args: argparse.Namespace) -> Setting:
    """Gives the setting that the options say. Raises `SpecmdError` with one line."""
    asked = {one.name: getattr(args, one.name) for one in fields(Setting)}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if value == "none" and name not in AXES:  # a prefetch policy has this name
            given[name] = None
    given["numbers"] = dict(given.get("numbers", ()))
    return make_setting(**given)


def _reader(hint: Any) -> tuple[Callable[[str], Any], str]:
    """Gives what reads a text, and what stands for it in the help."""
    kinds = _members(hint)
    lists = {kind for kind in kinds if _is(kind, Sequence) and get_args(kind) == (float,)}
    if any(_is(kind, Mapping) for kind in kinds):
        return numbers, "A=1,B=2"
    if str not in kinds and lists:
        return _floats, "X,X"
    return {frozenset({int}): (int, "N"), frozenset({float}): (float, "X")}.get(frozenset(kinds), (str, "TEXT"))


def _is(kind: Any, of: type) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, of)


def _members(hint: Any) -> set[Any]:
    """Gives the types of a union but for None, or the only one."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {kind for kind in members if kind is not types.NoneType}


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in items(text))


def _texts() -> dict[str, str]:
    """Gives the text below each field of `Setting`, as one line without its full stop."""
    (of_class,) = ast.parse(dedent(inspect.getsource(Setting))).body
    assert isinstance(of_class, ast.ClassDef)
    found, name = {}, None
    for line in of_class.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            name = line.target.id
        elif name is not None and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            found[name] = " ".join(str(line.value.value).split()).removesuffix(".")
            name = None
        else:
            name = None
    return found
