"""Whether the rows of a response are its tokens: the last generated token was never run, so it has no row."""

from __future__ import annotations

from typing import Any

from specmd_jax.errors import SpecmdError


def prompt_rows(
    place: str, rows: int, prompt: int, generated: int | None, start: int = 0, cached: int = 0
) -> tuple[int, int]:
    """Gives how many of the rows are prompt, and how many prompt tokens have none.

    Args:
      prompt, generated: tokens; None: not said, and any rows behind the prompt pass.
      start: the first token that the rows have.
      cached: tokens out of a prefix cache, which may or may not have rows.
    Raises:
      SpecmdError: other rows than tokens, with both counts.
    """
    for missing in dict.fromkeys((start, cached) if not start else (start,)):
        if generated is None:
            if rows >= prompt - missing >= 0:
                return prompt - missing, missing
        elif rows in (prompt + generated - 1 - missing, prompt + generated - missing) and rows:
            return max(prompt - missing, 0), min(missing, prompt)
    said = f"{prompt} prompt and {generated} generated tokens" if generated is not None else f"{prompt} prompt tokens"
    hidden = f", {start} in front not sent" if start else f", {cached} of the prompt cached" if cached else ""
    last = prompt - start if generated is None else prompt + generated - 1 - start
    wanted = f"at least {max(last, 0)}" if generated is None else f"{max(last, 0)}"
    raise SpecmdError(
        f"{place}: {rows} rows of routed experts, expected {wanted} ({said}, the last without one{hidden})"
    )


def number(record: Any, *names: str) -> int | None:
    """Gives the first whole number from 0 on under one of these names, or None."""
    if isinstance(record, dict):
        for name in names:
            value = record.get(name)
            if type(value) is int and 0 <= value < 1 << 31:
                return value
    return None


def length(record: Any, *names: str) -> int | None:
    """Gives the length of the first list under one of these names, or None."""
    if isinstance(record, dict):
        for name in names:
            if isinstance(record.get(name), list):
                return len(record[name])
    return None
