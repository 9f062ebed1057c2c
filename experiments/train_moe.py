"""Trains a small mixture of experts from scratch, on text of several domains: the model that comes with this package.

    python -m experiments.train_moe --smoke                               # seconds, on this package's own source
    python -m experiments.train_moe --corpus TEXTS --data DATA            # tokenizer and tokens; trains nothing
    python -m experiments.train_moe --data DATA --time-limit 280          # as many steps as fit, up to --epochs
    python -m experiments.train_moe --data DATA --time-limit 120 --dense --out results/train_dense
    python -m experiments.train_moe --data DATA --time-limit 150 --run-time 280  # the same goes on

A corpus has a file per domain (specmd_jax/moe/training/corpus.py). The last documents of each, about one part in
twenty, are held out. The network is a qwen3_moe; with --dense one expert per layer, as wide as the experts that a
token uses.

With a time, the first steps are measured and the number of steps is chosen so that the course of the learning rate ends
in time (run/plan.json has it). Every evaluation ends with a checkpoint. A run that was killed, or whose time was up,
goes on with the same command, on a CPU to the same weights bit for bit. The weights with the best held-out bits per
byte, plain mean of the domains, are the run's.

Writes rows.csv and manifest.json (the course of the run), results.json (all held-out text, beside what gzip and xz make
of it, and which experts each domain uses) and model/ (config.json, safetensors, tokenizer.json; transformers loads it)
to results/train_moe, and what it goes on from to run/ there.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()  # JAX's start counts against a time limit

import json  # noqa: E402
import math  # noqa: E402
import shutil  # noqa: E402
from argparse import Namespace  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402

from configs.train_moe import TrainMoEConfig  # noqa: E402
from experiments.common.command_line import main_guard, parser, results_folder  # noqa: E402
from experiments.common.options import options_of, settings_of  # noqa: E402
from specmd_jax.errors import SpecmdError  # noqa: E402
from specmd_jax.files import replace_text  # noqa: E402
from specmd_jax.moe.training import held_out  # noqa: E402
from specmd_jax.moe.training.corpus import Data, open_data, prepare, read_corpus  # noqa: E402
from specmd_jax.moe.training.export import export  # noqa: E402
from specmd_jax.moe.training.held_out import Score, mean_bits  # noqa: E402
from specmd_jax.moe.training.loop import Finished, Limits, Point, fit, flops_per_token  # noqa: E402
from specmd_jax.moe.training.parameters import active_matmul_weights, total_weights  # noqa: E402
from specmd_jax.report.columns import Row  # noqa: E402
from specmd_jax.report.pages.train_moe import DOMAINS, RESULTS, TABLE, draw  # noqa: E402
from specmd_jax.report.writer import ResultWriter  # noqa: E402

ROOT = Path(__file__).parents[1]
MODEL, RUN = "model", "run"


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "train_moe", resume=True)
    options_of(options, TrainMoEConfig())
    args = options.parse_args(argv)
    config = settings_of(args, TrainMoEConfig())
    if config.corpus is not None and config.data is not None:
        prepare(read_corpus(config.corpus), config.data, config.vocabulary)
        return
    out = results_folder(options, args)
    if config.data is None and not args.smoke:
        raise SpecmdError("--data FOLDER is missing; --corpus TEXTS --data FOLDER makes one, only --smoke does without")
    told = {name: value for name, value in asdict(config).items() if name not in ("time_limit", "run_time")}
    with TemporaryDirectory() as place:
        data = own_source(place, config.vocabulary) if config.data is None else open_data(config.data)
        train(config, data, out, told, args)


def train(config: TrainMoEConfig, data: Data, out: Path, told: dict[str, Any], args: Namespace) -> None:
    """Runs, or goes on, up to the last evaluation and the export, if the time allows."""
    with ResultWriter(out, told, TABLE, args.overwrite, args.resume, data.fingerprint) as writer:
        writer.begin()
        if args.overwrite:
            for folder in (RUN, MODEL):
                shutil.rmtree(out / folder, ignore_errors=True)
        limits = Limits(BEGAN, config.time_limit, config.run_time)

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
    print(draw(out))


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


if __name__ == "__main__":
    main_guard(main)
