"""``specmd VERB ...``: the overview of all commands, and the way to each."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from experiments.common.command_line import main_guard
from experiments.common.program import GROUPS, VERBS, Verb, by_verb
from specmd_jax import __version__
from specmd_jax.errors import SpecmdError

HELP = ("-h", "--help", "help")
CLOSING = "specmd VERB --help has the options of a verb; specmd --version says which version this is."


def overview() -> str:
    """Gives what there is to do, a line for each verb."""
    width = max(map(len, VERBS)) + 2
    lines = ["usage: specmd VERB [options]", "", "Caches of mixture-of-experts models: replays, studies, real models."]
    for title, verbs in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:{width}}{verb.about}" for name, verb in verbs.items())]
    return "\n".join([*lines, "", CLOSING])


def found(words: Sequence[str]) -> tuple[Verb, list[str]]:
    """Gives the verb that some words begin with, and the rest of them.

    A verb of two words goes before the verb that is its first. Raises `SpecmdError` for a word that is no verb, naming
    the nearest.
    """
    name = words[0].replace("-", "_")
    pair = " ".join([name, *words[1:2]])
    if pair in VERBS:
        return VERBS[pair], list(words[2:])
    if name in VERBS:
        return VERBS[name], list(words[1:])
    near = difflib.get_close_matches(name, [*VERBS, *(verb.module for verb in VERBS.values())], n=1)
    hint = next((verb for verb, about in VERBS.items() if near and near[0] in (verb, about.module)), None)
    raise SpecmdError(f"unknown verb {words[0]!r}{f'; did you mean {hint!r}?' if hint else ''} (see specmd --help)")


def run(words: Sequence[str]) -> None:
    """Runs what was typed behind `specmd`."""
    if not words or words[0] in HELP[:2] or list(words) == ["help"]:
        print(overview())
    elif words[0] in ("--version", "-V"):
        print(f"specmd-jax {__version__}")
    elif words[0] == "help":
        run([*words[1:], "--help"])
    else:
        verb, rest = found(words)
        import_module(f"experiments.{verb.module}").main(rest)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and ends as all of them do."""
    by_verb(True)
    main_guard(lambda: run(sys.argv[1:] if argv is None else argv))
