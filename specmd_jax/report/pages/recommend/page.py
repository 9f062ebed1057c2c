"""What `experiments.recommend` prints and draws, from its table alone."""

from __future__ import annotations

from pathlib import Path

from specmd_jax.report.document import Document
from specmd_jax.report.figures import save
from specmd_jax.report.pages.recommend.advice import Answer, advice, beside, headline, on_host, sort_out
from specmd_jax.report.pages.recommend.front import pareto
from specmd_jax.report.pages.recommend.views import fill, short_title
from specmd_jax.report.reader import ROWS, read_manifest, read_rows


def answered(out: Path) -> Answer:
    """Gives the rows of a folder, sorted out."""
    return sort_out(read_rows(out), read_manifest(out)["config"])


def draw_beside(out: Path) -> str:
    """Writes report.html, report.md and figures/pareto.png, what more memory buys, into `out`; gives what stands beside
    the answer as text.
    """
    answer = answered(out)
    best = answer.best
    what = f"{best['model']} on {best['hardware']}, batch {best['batch']}: what more memory buys"
    figure = pareto(answer.grid, int(best["memory_bytes"] or 0), f"{what}\n{best['evidence']}", answer.target_s)
    page = Document(short_title(answer), read_manifest(out))
    fill(page, answer)
    page.picture(save(figure, out, "pareto"), what)
    told = "\n".join(line for line in (headline(answer), on_host(answer)) if line is not None)
    paths = [out / "figures" / "pareto.png", *page.save(out), out / ROWS]
    return "\n\n".join([beside(answer), told, "\n".join(map(str, paths))])


def draw(out: Path) -> str:
    """Gives the answer and what stands beside it as text for a terminal, and draws the page."""
    return f"{advice(answered(out))}\n\n{draw_beside(out)}"
