"""From text to tokens and back, by the ``tokenizer.json`` of a checkpoint folder.

The package `tokenizers` reads that file; it is an extra (``specmd-jax[text]``) and imported when it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError, shown
from specmd_jax.inputs import read_json

TOKENIZER, GENERATION, CONFIG = "tokenizer.json", "generation_config.json", "config.json"
MOST_WAITING = 16  # tokens; more than any character has
_BROKEN = "\ufffd"  # what a decoder gives for bytes that are no whole character yet


def open_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Gives the `tokenizers.Tokenizer` of a checkpoint folder.

    Raises:
        SpecmdError: the file is missing or cannot be read, or the package is not installed.
    """
    path = Path(folder) / TOKENIZER
    if not os.path.isfile(path):
        raise SpecmdError(f"{folder}: no {TOKENIZER} there, expected it beside the weights (token ids need none)")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SpecmdError("the package tokenizers is not installed: pip install 'specmd-jax[text]'") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise SpecmdError(f"{path}: not a tokenizer ({str(error).splitlines()[0]})") from None


def end_tokens(folder: str | os.PathLike[str]) -> frozenset[int]:
    """Gives the tokens that end a text, by ``generation_config.json`` or else ``config.json``; none if neither says.

    Raises:
        SpecmdError: a file that is not JSON, or ids that are none.
    """
    for path in (Path(folder) / GENERATION, Path(folder) / CONFIG):
        if not os.path.isfile(path):
            continue
        found = read_json(path)
        ids = found.get("eos_token_id") if isinstance(found, dict) else None
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(one) is int for one in ids):
            raise SpecmdError(f"{path}: eos_token_id is {shown(ids)}, expected a token id or a list of them")
        return frozenset(ids)
    return frozenset()


class Pieces:
    """Turns tokens into pieces of text as they come: joined they are the text, and each is whole characters.

    What a token adds to a text depends on those before it (a leading space, half a character). So each piece is what
    the latest tokens are with the new one, less what they are without it, and waits until its last character is whole
    (but not for ever, where bytes make no character at all).

    Args:
        tokenizer: of `open_tokenizer`. ``before``: the tokens that the text goes on from.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self._tokenizer, self._latest, self._known = tokenizer, list(before), len(before)

    def __call__(self, token: int) -> str:
        """Takes the next token; gives what can be shown now, which may be nothing."""
        self._latest.append(token)
        piece = self._new()
        waiting = len(self._latest) - self._known
        if not piece or (piece.endswith(_BROKEN) and waiting < MOST_WAITING):
            return ""
        self._latest, self._known = self._latest[self._known :], len(self._latest) - self._known
        return piece

    def rest(self) -> str:
        """Gives what has been waiting when no more tokens come."""
        piece = self._new()
        self._known = len(self._latest)
        return piece

    def _new(self) -> str:
        shown = self._tokenizer.decode(self._latest[: self._known])
        return self._tokenizer.decode(self._latest)[len(shown) :]
