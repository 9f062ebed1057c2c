"""What `experiments.recommend` prints and draws, from its table alone."""

from __future__ import annotations

from pathlib import Path

from specmd_jax.report.figures import save
from specmd_jax.report.pages.recommend.advice import advice, sort_out
from specmd_jax.report.pages.recommend.front import pareto
from specmd_jax.report.reader import ROWS, read_manifest, read_rows


def draw(out: Path) -> str:
    """Draws figures/pareto.png, what more memory buys, into `out`; gives the advice as text for a terminal."""
    config = read_manifest(out)["config"]
    target_s = None if config["target_tpot_ms"] is None else config["target_tpot_ms"] / 1e3
    answer = sort_out(read_rows(out), config["capacity_bytes"], target_s)
    best = answer.best
    what = f"{best['model']} on {best['hardware']}, batch {best['batch']}: what more memory buys"
    figure = pareto(answer.grid, int(best["memory_bytes"] or 0), f"{what}\n{best['evidence']}", target_s)
    return f"{advice(answer)}\n\n{save(figure, out, 'pareto')}\n{out / ROWS}"
