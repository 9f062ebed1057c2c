"""The work of `experiments.recommend`: the answer first, then the studies beside it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from configs.recommend import RecommendConfig
from experiments.common.timelines import write_timelines
from experiments.recommending.question import ask
from experiments.recommending.replays import Replays, guarded
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.recommend.advice import advice
from specmd_jax.report.pages.recommend.page import answered, draw_beside
from specmd_jax.report.pages.recommend.table import TABLE
from specmd_jax.report.writer import ResultWriter


def run(
    config: RecommendConfig, out: Path, *, overwrite: bool, resume: bool, timeline: Path | None, passes: int
) -> None:
    """Replays, and prints the answer as soon as it is known; a `timeline` has the best mix."""
    question = ask(config)
    replays, rows, told = Replays(question), list[Row](), False
    stored = asdict(config) | question.stored
    try:
        with ResultWriter(out, stored, TABLE, overwrite, resume, question.routing.sha256) as writer:
            for row in replays.answer():
                writer.write(row)
                rows.append(row)
            print(advice(answered(out)), end="\n\n", flush=True)
            told = True
            for name, study in replays.beside(rows).items():
                for row in guarded(name, study, lambda line: print(line, flush=True)):
                    writer.write(row)
    except KeyboardInterrupt:
        if any(row["capacity_bytes"] == question.budget_bytes for row in rows):
            print("interrupted; what is there:", file=sys.stderr)
            if not told:
                print(advice(answered(out)), end="\n\n")
            print(draw_beside(out), flush=True)
        raise
    print(draw_beside(out))
    if timeline is not None:
        print(write_timelines(timeline, replays.drawn(rows, passes)))
