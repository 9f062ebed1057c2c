"""``--config FILE``: options of a command from a JSON or TOML file. What is typed wins over what the file says.

Keys are those of the options (``capacities``, ``--capacities`` and ``host-capacity`` alike), and settings that the
command line leaves alone (`configs.options.fixed`). A value is what a program would give (numbers, lists, true), or the
text that one would type.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError, unknown

NOT_THERE = ("help", "config", "print_config")


def read_config(path: Path) -> dict[str, Any]:
    """Gives what a file says, by key as a field is spelt. Raises `SpecmdError` for what is neither JSON nor TOML."""
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise SpecmdError(f"{path}: cannot read: {error.strerror or error}") from None
    except ValueError as error:
        raise SpecmdError(f"{path}: expected JSON, or TOML in a file that ends in .toml: {error}") from None
    if not isinstance(found, dict):
        raise SpecmdError(f"{path}: expected an object with options by name, found {type(found).__name__}")
    return {key.removeprefix("--").replace("-", "_"): value for key, value in found.items()}


def is_model(config: Mapping[str, Any]) -> bool:
    """Whether what a file says is a model's ``config.json``, not options."""
    return "model_type" in config or "architectures" in config


def typed(path: Path, config: Mapping[str, Any], parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Gives the options that a file asks for as they would be typed, but those that are in `argv`.

    Raises `SpecmdError` for a key that is neither an option nor one of the parser's `fixed` settings.
    """
    known: dict[str, argparse.Action] = {}
    for action in parser._actions:
        for flag in action.option_strings:
            if action.dest not in NOT_THERE:
                known[flag.lstrip("-").replace("-", "_")] = action  # an alias as well
    words: list[str] = []
    for key, value in config.items():
        if key in getattr(parser, "fixed", {}):
            continue
        if key not in known:
            error = unknown("setting", key, [*known, *getattr(parser, "fixed", {})])
            raise SpecmdError(f"{path}: {str(error).split(' (known: ')[0]} (see {parser.prog} --help)")
        action = known[key]
        given = {word.split("=", 1)[0] for word in argv}
        if value is None or given & set(_all_strings(parser, action.dest)):
            continue
        flag = action.option_strings[0]
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise SpecmdError(f"{path}: {key} is {value!r}, expected true or false")
            negative = next((one for one in action.option_strings if one.startswith("--no-")), None)
            words += [flag] if value else [negative] if negative else []
        else:
            words.append(f"{flag}={_text(path, key, value)}")
    return words


def fixed_values(path: Path, config: Mapping[str, Any], fixed: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """Gives the settings of a file that are no options, as their fields hold them."""
    return {name: _like(path, name, config[name], fixed[name].default) for name in config if name in fixed}


def _all_strings(parser: argparse.ArgumentParser, dest: str) -> list[str]:
    return [flag for action in parser._actions if action.dest == dest for flag in action.option_strings]


def _text(path: Path, key: str, value: Any) -> str:
    """Gives a value as one would type it."""
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if isinstance(value, list):
        return ",".join("=".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)
    if isinstance(value, bool):
        raise SpecmdError(f"{path}: {key} is {str(value).lower()}, expected a value")
    return str(value)


def _like(path: Path, name: str, value: Any, default: Any) -> Any:
    """Gives a value of the kind that the default is of."""
    if isinstance(default, tuple) and isinstance(value, list):
        first = default[0] if default else MISSING
        return tuple(value if first is MISSING else (_like(path, name, item, first) for item in value))
    kinds = (int, float) if isinstance(default, float) else type(default)
    if default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
        raise SpecmdError(f"{path}: {name} is {value!r}, expected such as {json.dumps(default)}")
    return float(value) if isinstance(default, float) else value
