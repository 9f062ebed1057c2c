"""The prompt of `experiments.offload` as tokens, and what prints the tokens that follow."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from configs.completion import Completion
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint.text import Pieces, end_tokens, open_tokenizer


class Prompt(NamedTuple):
    """What is to be completed."""

    ids: tuple[int, ...]
    tokenizer: Any  # None: ids are printed
    ends: frozenset[int]  # tokens that end the text


def read_prompt(config: Completion, vocabulary: int) -> Prompt:
    """Gives the prompt of the settings, as the checkpoint's tokenizer reads it.

    Raises `SpecmdError` for a prompt that is empty or no text, and for a folder without a tokenizer.
    """
    folder = config.weights
    ends = frozenset() if folder is None else end_tokens(folder)
    if config.prompt_ids is not None:
        return Prompt(config.prompt_ids, None, ends)
    text = _text(config)
    if folder is None:
        _note(
            f"made-up weights know no text: the tokens are the prompt's bytes modulo {vocabulary}, and ids are printed"
        )
        return Prompt(tuple(byte % vocabulary for byte in text.encode()), None, ends)
    tokenizer = open_tokenizer(folder)
    ids = tuple(tokenizer.encode(text).ids)
    if not ids:
        raise SpecmdError(f"the prompt is no token of {folder}, expected text that it knows")
    return Prompt(ids, tokenizer, ends)


def _text(config: Completion) -> str:
    """Reads the prompt; one line break at the end of a file or of stdin is none of it."""
    if config.prompt is not None and config.prompt != "-":
        return config.prompt
    place = "stdin" if config.prompt_file is None else config.prompt_file
    data = sys.stdin.buffer.read() if config.prompt_file is None else Path(config.prompt_file).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SpecmdError(f"{place}: byte {error.start} is no UTF-8, expected the text of a prompt") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise SpecmdError(f"{place} is empty, expected the text of a prompt")
    return text


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Printer:
    """Prints tokens as they come: text, or ids where there is no tokenizer. The ``on_token`` of an engine."""

    def __init__(self, prompt: Prompt):
        self._pieces = None if prompt.tokenizer is None else Pieces(prompt.tokenizer, prompt.ids)
        self._ends: Collection[int] = prompt.ends
        self.ended = False  # by the model

    def __call__(self, request: int, step: int, token: int) -> bool:
        del request
        if token in self._ends:
            self.ended = True
        elif self._pieces is not None:
            self._show(self._pieces(token))
        else:
            self._show(f" {token}" if step else str(token))
        return self.ended

    def finish(self) -> None:
        """Prints what is left, and ends the line."""
        self._show("\n" if self._pieces is None else f"{self._pieces.rest()}\n")

    def _show(self, text: str) -> None:
        print(text, end="", flush=True)
