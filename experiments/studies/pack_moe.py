"""The work of `experiments.pack_moe`: a checkpoint is packed, and both read held-out text."""

from __future__ import annotations

import csv
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.pack_moe import PackMoEConfig
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.measure.held_out import bits_of
from specmd_jax.moe.training.corpus import open_data
from specmd_jax.moe.training.export import pack, plain
from specmd_jax.moe.training.held_out import cut
from specmd_jax.reference import BYTES_PER_TOKEN, HELD_OUT, PACKING, HeldOut, held_out_texts, reference_folder
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.pack_moe import TABLE
from specmd_jax.report.writer import ResultWriter

PACKED, PLAIN = "packed", "plain"

Recorded = dict[tuple[str, int], tuple[float, float]]
"""(domain, tokens) -> bits per byte before and after packing."""


def run(config: PackMoEConfig, out: Path, *, overwrite: bool) -> None:
    """Packs, reads and writes; see `experiments.pack_moe`."""
    source = reference_folder() if config.checkpoint is None else Path(config.checkpoint)
    texts = {name: shortened(text, config) for name, text in texts_of(config, source).items()}
    with ResultWriter(out, asdict(config), TABLE, overwrite) as writer:
        writer.begin()
        for name in (PACKED, PLAIN):
            shutil.rmtree(out / name, ignore_errors=True)
        held = source
        if config.checkpoint is not None:
            held = pack(source, out / PACKED)
            write_texts(held / HELD_OUT, texts)
        if config.plain:
            plain(held, out / PLAIN)
        for row in rows(None if held is source else source, held, texts, recorded(held)):
            writer.write(row)


def rows(source: Path | None, held: Path, texts: dict[str, HeldOut], known: Recorded) -> list[Row]:
    """Gives a row for each domain: what was measured of the packed checkpoint and its ``source``, and what is known of
    both from when it was packed, where that was of as much text."""
    after = bits_of(held, texts)
    before = None if source is None else bits_of(source, texts)
    found: list[Row] = []
    for name, bits in after.items():
        whole = len(texts[name].windows) * (texts[name].windows.shape[1] - 1)
        then = known.get((name, whole))
        found.append({
            "domain": name,
            "tokens": bits.tokens,
            "bits_per_byte": None if before is None else before[name].bits_per_byte,
            "packed_bits_per_byte": bits.bits_per_byte,
            "recorded_bits_per_byte": None if then is None else then[0],
            "recorded_packed_bits_per_byte": None if then is None else then[1],
            "evidence": "measured",
        })  # fmt: skip
    return found


def recorded(folder: Path) -> Recorded:
    """Gives what a checkpoint's folder says of itself; nothing where it says nothing."""
    path = folder / PACKING
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {
            (line["domain"], int(line["tokens"])): (float(line["bits_per_byte"]), float(line["packed_bits_per_byte"]))
            for line in csv.DictReader(file)
        }


def texts_of(config: PackMoEConfig, source: Path) -> dict[str, HeldOut]:
    """Gives held-out text: of the data that was trained on, or of the checkpoint's folder."""
    if config.data is None:
        return held_out_texts(source)
    data, found = open_data(config.data), {}
    for name, domain in data.domains.items():
        text = data.held_out[domain.held_out.begin : domain.held_out.end]
        windows, real = cut(text, min(config.tokens, len(text) - 1))
        found[name] = HeldOut(windows[real.all(axis=1)].astype(np.uint16), domain.held_out.bytes / len(text))
    return found


def shortened(text: HeldOut, config: PackMoEConfig) -> HeldOut:
    """Gives at most as many windows as the settings say, spread evenly, and so many tokens of each."""
    count = len(text.windows)
    chosen = np.linspace(0, count - 1, min(config.windows, count)).round().astype(int)
    return text._replace(windows=text.windows[chosen, : config.tokens + 1])


def write_texts(path: Path, texts: dict[str, HeldOut]) -> None:
    """Writes text as `held_out_texts` reads it. Raises SpecmdError where a domain is called as the sizes are."""
    if BYTES_PER_TOKEN in texts:
        raise SpecmdError(f"{path}: a domain is called {BYTES_PER_TOKEN}, expected another name")
    arrays: dict[str, Any] = {name: text.windows for name, text in texts.items()}
    arrays[BYTES_PER_TOKEN] = np.array([text.bytes_per_token for text in texts.values()])
    np.savez_compressed(path, **arrays)
