"""The work of `experiments.train_moe`: a run up to its last evaluation, and the model that comes of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from configs.train_moe import TrainMoEConfig
from specmd_jax.files import replace_text
from specmd_jax.moe.training import held_out
from specmd_jax.moe.training.corpus import Data, open_data, prepare, read_corpus
from specmd_jax.moe.training.export import export
from specmd_jax.moe.training.held_out import Score, mean_bits
from specmd_jax.moe.training.loop import Finished, Limits, Point, fit, flops_per_token
from specmd_jax.moe.training.parameters import active_matmul_weights, total_weights
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.train_moe import DOMAINS, RESULTS, TABLE
from specmd_jax.report.writer import ResultWriter

ROOT = Path(__file__).parents[2]
MODEL, RUN = "model", "run"


def make_data(config: TrainMoEConfig) -> None:
    """Makes the folder of tokens of the texts of a corpus."""
    assert config.corpus is not None and config.data is not None
    prepare(read_corpus(config.corpus), config.data, config.vocabulary)


def run(config: TrainMoEConfig, out: Path, *, overwrite: bool, resume: bool, began: float) -> None:
    """Trains, on the data of the settings or, where there is none, on this package's own source."""
    with TemporaryDirectory() as place:
        data = own_source(place, config.vocabulary) if config.data is None else open_data(config.data)
        train(config, data, out, overwrite, resume, began)


def train(config: TrainMoEConfig, data: Data, out: Path, overwrite: bool, resume: bool, began: float) -> None:
    """Runs, or goes on, up to the last evaluation and the export, if the time allows."""
    told = {name: value for name, value in asdict(config).items() if name not in ("time_limit", "run_time")}
    with ResultWriter(out, told, TABLE, overwrite, resume, data.fingerprint) as writer:
        writer.begin()
        if overwrite:
            for folder in (RUN, MODEL):
                shutil.rmtree(out / folder, ignore_errors=True)
        limits = Limits(began, config.time_limit, config.run_time)

        def hear(point: Point) -> None:
            writer.write(row(point, config, data))

        finished = fit(data, config.training, out / RUN, limits, hear, _say)
        if not finished.done:
            return
        _say("scores all held-out text")
        scores = held_out.scores(
            finished.cfg, config.training, finished.best, data, finished.plan.attention, config.final_windows or None
        )
        replace_text(out / RESULTS, json.dumps(results(config, data, finished, scores), indent=1) + "\n")
        export(out / MODEL, config.training, finished.best, data)


def own_source(folder: str, vocabulary: int) -> Data:
    """Gives the data folder of a smoke run: this package's pages as prose, some of its source as code."""
    package = ROOT / "specmd_jax"
    pages = [path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.md"))]
    source = [path.read_text(encoding="utf-8") for path in sorted((package / "replay").glob("*.py"))]
    texts = {
        "prose": "\n".join(f"# Title: {text}" for text in pages),
        "code": "\n".join(f"# SPDX-License-Identifier: Apache-2.0\n{text}" for text in source),
    }
    return prepare(texts, folder, vocabulary, _say)


def row(point: Point, config: TrainMoEConfig, data: Data) -> Row:
    """Gives a row of the table."""
    tokens = point.step * config.training.tokens_per_step
    bits = {name: point.scores[name].bits_per_byte if name in point.scores else None for name in DOMAINS}
    return {
        "step": point.step,
        "tokens": tokens,
        "epochs": tokens / data.train_tokens,
        "learning_rate": point.rate,
        **{name: float(value) for name, value in point.told._asdict().items()},
        "held_out": mean_bits(point.scores),
        **{f"held_out_{name}": value for name, value in bits.items()},
        "tokens_per_s": point.tokens_per_s,
        "flops_per_s": point.flops_per_s,
        "elapsed_s": point.elapsed_s,
        "evidence": "measured",
    }


def results(config: TrainMoEConfig, data: Data, finished: Finished, scores: dict[str, Score]) -> dict[str, Any]:
    """Gives what results.json holds."""
    domains = {}
    for name, score in scores.items():
        kept = data.domains[name]
        domains[name] = {
            "tokens": score.tokens,
            "loss": score.loss,
            "perplexity": math.exp(score.loss),
            "bits_per_byte": score.bits_per_byte,
            "gzip_bits_per_byte": 8 * kept.gzip_bytes / kept.held_out.bytes,
            "xz_bits_per_byte": 8 * kept.xz_bytes / kept.held_out.bytes,
            "choices": score.choices.tolist(),
        }
    return {
        "evidence": "measured",
        "plan": asdict(finished.plan),
        "settings": asdict(config.training),
        "data": data.fingerprint,
        "weights": total_weights(finished.cfg),
        "active_weights": active_matmul_weights(finished.cfg),
        "flops_per_token": flops_per_token(finished.cfg, config.training.sequence),
        "bits_per_byte": mean_bits(scores),
        "domains": domains,
    }


def _say(line: str) -> None:
    print(f"  {line}", flush=True)
