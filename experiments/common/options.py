"""Options of the command line from the fields of a study's settings (`configs.options`), and the settings from them.

tyro does this for any dataclass, but answers a bad option with a box of six lines and takes a list as words with spaces
between; here every error is one line and a list has commas.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Container, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from configs.options import Setting, Settings
from experiments.common.command_line import print_settings

S = TypeVar("S", bound=Settings)
METAVARS = {int: "N", float: "X", str: "NAME"}


class Option(NamedTuple):
    """A field that has an option."""

    name: str  # of the field, and of the parsed argument
    type: Any
    default: Any
    setting: Setting
    owner: str  # the field of the settings that holds it; "": they do so themselves

    @property
    def help(self) -> str:
        """Its meaning, what there is to choose from, and the default."""
        return f"{self.setting.help}{self._known()} (default: {self.setting.shown or shown(self.default)})"

    def _known(self) -> str:
        names = self.setting.names
        if names is None or all(name in self.setting.help for name in names.known()):
            return ""
        files = ", or a file" if names.suffix else ""
        return f"; {'some' if _is_list(self.type) else 'one'} of: {', '.join(names.known())}{files}"


def options_of(parser: argparse._ActionsContainer, defaults: Settings, but: Container[str] = ()) -> None:
    """Adds an option for each field of `defaults` that asks for one, ``but`` some; its value there is the default."""
    if isinstance(parser, argparse.ArgumentParser):
        fixed = {one.name: one for one in fields(defaults) if "setting" in one.metadata}
        parser.fixed = {name: one for name, one in fixed.items() if not one.metadata["setting"].option}  # type: ignore
    for option in declared(defaults):
        if option.name in but:
            continue
        item = _item(option.type)
        how: dict[str, Any] = {"action": "store_true"}
        if option.type is not bool:
            metavar = option.setting.metavar or ("A,B" if _is_list(option.type) else METAVARS[item])
            how = {"type": _reader(option), "metavar": metavar}
            if option.setting.repeated:
                how["action"] = "extend"
        for name, help in ((option.name, option.help.replace("%", "%%")), (option.setting.alias, argparse.SUPPRESS)):
            if name:
                flag = f"--{name.replace('_', '-')}"
                parser.add_argument(flag, dest=option.name, default=None, help=help, **how)


def settings_of(args: argparse.Namespace, defaults: S) -> S:
    """Gives `defaults`, or their smoke run, with what the options say, checked. Raises `SpecmdError` with one line."""
    result: Any = defaults.smoke() if args.smoke else defaults
    result = replace(result, **getattr(args, "given_fixed", {}))
    for option in declared(defaults):
        value = getattr(args, option.name)
        if value is None:
            continue
        if option.setting.repeated:
            value = tuple(value)
        if option.owner:
            value = option.setting.checked(option.name, value, option.default)
            part = replace(getattr(result, option.owner), **{option.name: value})
            result = replace(result, **{option.owner: part})
        else:
            result = replace(result, **{option.name: value})
    found = result.checked()
    if getattr(args, "print_config", False):
        print_settings(args, plain(found))
    return found


def plain(settings: Settings) -> dict[str, Any]:
    """Gives settings by name as ``--config`` reads them: options, and what the command line leaves alone."""
    own = {one.name: getattr(settings, one.name) for one in fields(settings) if "setting" in one.metadata}
    defaults = {one.name: one.default for one in fields(settings)}
    told = {name: value for name, value in own.items() if value != () or defaults[name] != ()}  # not the empty default
    return told | {one.name: one.default for one in declared(settings) if one.owner}  # of `settings` themselves


def shown(value: Any) -> str:
    """Gives a default as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def names(text: str) -> tuple[str, ...]:
    """Reads a list with commas between, for ``type=`` of an option; nothing in it is an error."""
    found = items(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing, expected one or more with commas between")
    return found


def items(text: str) -> tuple[str, ...]:
    """Gives the parts between commas that are not blank."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def declared(defaults: Settings) -> Iterator[Option]:
    """Gives every field of `defaults` that has an option, those of its parts among them."""
    hints = get_type_hints(type(defaults))
    for one in fields(defaults):
        value = getattr(defaults, one.name)
        if "parts" in one.metadata:
            assert is_dataclass(value)
            inner = get_type_hints(type(value))
            for name, setting in one.metadata["parts"].items():
                yield Option(name, inner[name], getattr(value, name), setting, one.name)
        elif one.metadata["setting"].option:
            yield Option(one.name, hints[one.name], value, one.metadata["setting"], "")


def _is_list(kind: Any) -> bool:
    return get_origin(_without_none(kind)) is tuple


def _without_none(kind: Any) -> Any:
    """Gives X of ``X | None``."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    return kind


def _item(kind: Any) -> Any:
    """Gives the type of a value, or of each item of a list."""
    kind = _without_none(kind)
    return get_args(kind)[0] if get_origin(kind) is tuple else kind


def _reader(option: Option) -> Callable[[str], Any]:
    """Gives a function text -> value, for ``type=``; argparse makes one line of the errors it raises."""
    setting, item = option.setting, _item(option.type)
    if setting.read is not None:
        return setting.read
    if not _is_list(option.type):
        return item
    split = items if setting.may_be_empty else names

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(item(part) for part in split(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid list of {item.__name__} values: {text!r}") from None

    return read
