"""From text to a data folder: documents, a split by position, a byte-level tokenizer, token ids as uint16.

A corpus is a folder with a file ``NAME.txt`` or ``NAME.txt.xz`` for each domain of `DOMAINS` (some may be missing). Of
each domain the last documents, about one part in twenty, are held out. Documents that are there twice are kept where
they come first, so none is in both parts. The tokenizer is trained on the training part alone.

A data folder holds ``train.npy`` and ``held_out.npy`` (uint16, the domains one behind the other), ``tokenizer.json``
and ``data.json`` (`Data`). Each document begins with the token ``<|end|>``, which ends the one before.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.files import replace_text, whole_file
from specmd_jax.moe.checkpoint.text import TOKENIZER
from specmd_jax.training import END, END_ID

HELD_OUT_SHARE = 0.05
SEPARATOR = "\n\n"
TRAIN, HELD_OUT, CARD = "train.npy", "held_out.npy", "data.json"
FORMAT = 1


class Domain(NamedTuple):
    """A kind of text: where its documents begin, and how many of a hundred sequences of a batch are of it."""

    begins: str  # a regular expression, multi-line
    share: int


DOMAINS: dict[str, Domain] = {
    "prose": Domain(r"^# Title: ", 40),
    "chinese": Domain(r"(?<=\n\n)", 21),
    "code": Domain(r"^# SPDX-License-Identifier", 27),
    "maths": Domain(r"^Question: ", 10),
    "dialogue": Domain(r"(?<=\n\n)", 2),
}


class Part(NamedTuple):
    """What a domain has in one of the two arrays."""

    begin: int  # in tokens
    end: int
    documents: int
    bytes: int  # of its text as UTF-8, two for the end of each document


class DomainData(NamedTuple):
    """A domain of a data folder."""

    train: Part
    held_out: Part
    gzip_bytes: int  # of the held-out text, each document behind the other, by gzip -9
    xz_bytes: int  # ... and by xz -9e


class Data(NamedTuple):
    """A data folder: the arrays are mapped, not read."""

    folder: Path
    train: npt.NDArray[np.uint16]
    held_out: npt.NDArray[np.uint16]
    domains: dict[str, DomainData]
    vocabulary: int
    fingerprint: str  # of the arrays and the tokenizer

    @property
    def train_tokens(self) -> int:
        """Of all domains."""
        return len(self.train)


def prepare(
    corpus: dict[str, str], folder: str | os.PathLike[str], vocabulary: int, report: Callable[[str], object] = print
) -> Data:
    """Makes a data folder of texts by domain (`read_corpus`), or opens the one that is there; see the module.

    Raises SpecmdError for a domain that is not in `DOMAINS` or has no two documents, and without `tokenizers`.
    """
    out = Path(folder)
    parts = {name: split(documents(name, text)) for name, text in corpus.items()}
    tokenizer = train_tokenizer((text for train, _ in parts.values() for text in train), vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    size = tokenizer.get_vocab_size()
    train, held_out, card = [], [], {}
    at = [0, 0]
    for name, sides in parts.items():
        found = []
        for side, texts in enumerate(sides):
            ids = encode(tokenizer, texts)
            (train, held_out)[side].append(ids)
            used = sum(len(text.encode()) + len(SEPARATOR) for text in texts)
            found.append(Part(at[side], at[side] + len(ids), len(texts), used))
            at[side] += len(ids)
        text = SEPARATOR.join((*sides[1], "")).encode()
        assert len(text) == found[1].bytes
        card[name] = {
            "train": found[0]._asdict(),
            "held_out": found[1]._asdict(),
            "gzip_bytes": len(gzip.compress(text, 9, mtime=0)),
            "xz_bytes": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        }
        report(
            f"{name}: {found[0].documents} documents, {found[0].end - found[0].begin} tokens to train on "
            f"({found[0].bytes / (found[0].end - found[0].begin):.2f} bytes each); held out "
            f"{found[1].documents}, {found[1].end - found[1].begin}"
        )
    for name, arrays in ((TRAIN, train), (HELD_OUT, held_out)):
        with whole_file(out / name) as file:
            np.save(file, np.concatenate(arrays))
    replace_text(out / TOKENIZER, tokenizer.to_str(pretty=False))
    told = {"format": FORMAT, "vocabulary": size, "fingerprint": _fingerprint(out), "domains": card}
    replace_text(out / CARD, json.dumps(told, indent=2) + "\n")  # last: it says that the folder is whole
    return open_data(out)


def open_data(folder: str | os.PathLike[str]) -> Data:
    """Opens a data folder; raises SpecmdError for one that is not whole."""
    path = Path(folder)
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8"))
        if card["format"] != FORMAT:
            raise SpecmdError(f"{path / CARD}: format {card['format']}, expected {FORMAT}")
        domains = {
            name: DomainData(Part(**one["train"]), Part(**one["held_out"]), one["gzip_bytes"], one["xz_bytes"])
            for name, one in card["domains"].items()
        }
        train, held_out = (np.load(path / name, mmap_mode="r") for name in (TRAIN, HELD_OUT))
        return Data(path, train, held_out, domains, int(card["vocabulary"]), str(card["fingerprint"]))
    except OSError as error:
        raise SpecmdError(f"{path}: no data to train on there ({error.strerror}: {error.filename})") from None
    except (ValueError, KeyError, TypeError):
        raise SpecmdError(f"{path / CARD}: not the card of a data folder") from None


def read_corpus(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the texts of a corpus by domain; a character cut off at the end of a file is left out.

    Raises SpecmdError if none of the domains is there, or a file cannot be read.
    """
    found: dict[str, str] = {}
    for name in DOMAINS:
        for path, opened in ((Path(folder) / f"{name}.txt", open), (Path(folder) / f"{name}.txt.xz", lzma.open)):
            if path.is_file():
                with opened(path, "rb") as file:
                    found[name] = file.read().decode(errors="ignore").replace("\r\n", "\n")
                break
    if not found:
        raise SpecmdError(f"{folder}: no text there, expected files such as {next(iter(DOMAINS))}.txt or .txt.xz")
    return found


def documents(domain: str, text: str) -> list[str]:
    """Gives the documents of a domain in order, each once, without the empty lines around them."""
    if domain not in DOMAINS:
        raise SpecmdError(f"unknown domain {domain!r}, expected one of {', '.join(DOMAINS)}")
    starts = [0, *(match.start() for match in re.finditer(DOMAINS[domain].begins, text, re.MULTILINE)), len(text)]
    cut = (text[begin:end].strip("\n") for begin, end in itertools.pairwise(starts))
    return list(dict.fromkeys(document for document in cut if document.strip()))


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Parts documents by position: the last, at most `HELD_OUT_SHARE` of the text but at least one, are held out."""
    if len(texts) < 2:
        raise SpecmdError(f"{len(texts)} documents, expected at least 2: some are held out")
    lengths = np.array([len(text) for text in texts])
    before = np.cumsum(lengths) - lengths
    cut = int(np.searchsorted(before, (1 - HELD_OUT_SHARE) * lengths.sum()))
    cut = min(max(cut, 1), len(texts) - 1)
    return texts[:cut], texts[cut:]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Trains a byte-level BPE: every text has tokens, digits stand alone, `END` is token 0 and begins an encoding."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    except ImportError:
        raise SpecmdError("the package tokenizers is not installed: pip install 'specmd-jax[text]'") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, END_ID)]
    )
    return tokenizer


def encode(tokenizer: Any, texts: list[str]) -> npt.NDArray[np.uint16]:
    """Gives the tokens of documents one behind the other, each after `END`."""
    found = []
    for begin in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[begin : begin + 1000]):
            found.append(np.asarray(encoding.ids, np.uint16))
    return np.concatenate(found)


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (TRAIN, HELD_OUT, TOKENIZER):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
