"""The page of `experiments.quality`, drawn from its table alone: quality against speed at each cache size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specmd_jax.report.charts import Chart, Field, Record, dots
from specmd_jax.report.columns import Row
from specmd_jax.report.document import Document, Said
from specmd_jax.report.figures import save
from specmd_jax.report.pages.quality.front import (
    COLLAPSED,
    SAFE_PCT,
    at,
    collapsed,
    family,
    front,
    plain,
    safe,
    sizes,
)
from specmd_jax.report.pages.quality.picture import picture
from specmd_jax.report.pages.quality.table import EVIDENCE
from specmd_jax.report.reader import ROWS, read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.terminal import aligned

HEAD = (
    "cache", "rule", "held at", "hits %", "bits", "TPOT ms", "bits per byte", "change %", "KL nats", "tokens changed %",
    "lost or moved %", "is",
)  # fmt: skip


def draw(out: Path) -> str:
    """Writes report.md, report.html and figures/quality.png into `out`; gives the answer and the rows as text."""
    manifest, rows = read_manifest(out), read_rows(out)
    high = str(manifest["config"]["high"])
    page = Document(title(rows, high), manifest)
    said = answer(rows, high)
    page.answer(said)
    page.text(about(rows, manifest["config"]))
    views(page, rows)
    page.heading("All rules")
    page.table(HEAD, cells(rows))
    page.picture(save(picture(rows), out, "quality"), "Quality against speed")
    lines = [page.title, *(it.text for it in said), "", *aligned(HEAD, cells(rows))]
    return "\n".join([*lines, *map(str, [*page.save(out), out / ROWS])])


def about(rows: Sequence[Row], config: Mapping[str, Any]) -> str:
    """Says what the numbers are."""
    row = rows[0]
    return (
        f"Quality is measured: {row['model']} reads {row['places']} tokens of held-out text one by one, with its "
        "experts behind a cache (lru, nothing copied early). Change is in bits per byte, plain mean of the domains, "
        "against all experts on the device as shipped, with the standard error over tokens that both read. Time is "
        f"simulated: the routing of the same run on {config['hardware']}, experts and dense layers as large as those "
        f"of {config['sizes']}, layer by layer. Caches are in % of the bytes of all experts at 16 bits. Safe is a "
        f"change of at most {SAFE_PCT:g} %; on the front no other rule is as fast and as near in KL divergence, and "
        "better in one. One small model: its numbers say what these rules do to it, not to others."
    )


def title(rows: Sequence[Row], high: str) -> str:
    """States what is fastest and safe in the middle cache size."""
    pct = middle(rows)
    best = fastest(at(rows, pct))
    if best is None:
        return f"{rows[0]['model']}: no rule stays within {SAFE_PCT:g} % of the bits per byte with {pct:g} % cached"
    return (
        f"{rows[0]['model']}: {best['rule']} is the fastest rule within {SAFE_PCT:g} % of the bits per byte with "
        f"{pct:g} % cached{_against(best, plain(at(rows, pct), high), high)}"
    )


def middle(rows: Sequence[Row]) -> float:
    found = sizes(rows)
    return found[len(found) // 2]


def fastest(rows: Sequence[Row]) -> Row | None:
    """Gives the fastest safe rule of one cache size."""
    return min((row for row in rows if safe(row)), key=lambda row: number(row, "tpot_s"), default=None)


def _against(row: Row, base: Row | None, high: str) -> str:
    if base is None or row is base:
        return ""
    less = 100 * (1 - number(row, "tpot_s") / number(base, "tpot_s"))
    return f", {abs(less):.0f} % {'less' if less >= 0 else 'more'} time a token than fetching at {high}"


def answer(rows: Sequence[Row], high: str) -> list[Said]:
    """Gives what is fast and safe at each cache size, what lies on the front, and what collapses."""
    said = []
    for pct in sizes(rows):
        here = at(rows, pct)
        best, base = fastest(here), plain(here, high)
        if best is not None:
            said.append(
                Said(
                    f"With {pct:g} % cached the fastest safe rule is {best['rule']} ({best['precisions']}): "
                    f"{1e3 * number(best, 'tpot_s'):.1f} ms a token{_against(best, base, high)}, bits per byte "
                    f"{_change(best)} %.",
                    EVIDENCE,
                )
            )
        lossy = [row for row in front(here) if number(row, "kl_nats") > 0]
        named = ", ".join(f"{row['rule']} ({_change(row)} %)" for row in lossy)
        said.append(Said(f"On the front there: {named}.", EVIDENCE))
    broken = [f"{row['rule']} at {number(row, 'capacity_pct'):g} %" for row in rows if collapsed(row)]
    if broken:
        said.append(
            Said(f"The perplexity is {COLLAPSED:g} times as high or more under {', '.join(broken)}.", "measured")
        )
    same = [row["events_equal"] for row in rows if row["events_equal"] is not None]
    said.append(
        Said(
            f"In {sum(map(bool, same))} of {len(same)} runs under such rules the replay hits, drops and moves as often "
            "as the run did.",
            "measured and simulated",
        )
    )
    return said


def _change(row: Row) -> str:
    return f"{number(row, 'change_pct'):+.2f} ± {number(row, 'change_se_pct'):.2f}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Gives the table, by cache size and time, with a word for what is safe and on the front."""
    found = []
    for pct in sizes(rows):
        here = at(rows, pct)
        best = front(here)
        for row in sorted(here, key=lambda row: number(row, "tpot_s")):
            words = [word for word, holds in (("safe", safe(row)), ("front", row in best)) if holds]
            found.append([
                f"{pct:g} %", str(row["rule"]), str(row["precisions"]), f"{100 * number(row, 'hit_rate'):.1f}",
                f"{number(row, 'mean_bits'):.2f}", f"{1e3 * number(row, 'tpot_s'):.2f}",
                f"{number(row, 'bits_per_byte'):.4f}", _change(row), f"{number(row, 'kl_nats'):.4f}",
                f"{100 * number(row, 'changed_tokens'):.1f}",
                f"{100 * (number(row, 'dropped_share') + number(row, 'moved_share')):.1f}", ", ".join(words),
            ])  # fmt: skip
    return found


TPOT, CHANGE = (
    Field("tpot", "time of a token, ms (simulated)", ",.3~g"),
    Field("change", "bits per byte, change in %", "+.2f"),
)
TOLD = (
    Field("rule", "rule"), Field("held", "held at"), TPOT, CHANGE, Field("error", "± (standard error)", ".2f"),
    Field("kl", "KL, nats", ".4f"), Field("changed", "tokens changed, %", ".1f"), Field("hit", "hits, %", ".1f"),
    Field("copied", "of a token's bytes at 16 bits copied, %", ".1f"),
)  # fmt: skip


def views(page: Document, rows: Sequence[Row]) -> None:
    """Adds a chart for each cache size: the time of a token against what the rule costs."""
    for pct in sizes(rows):
        here = at(rows, pct)
        name, best = f"quality_{pct:g}".replace(".", "_"), front(here)
        page.data(name, [_record(row, row in best) for row in here])
        count = sum(safe(row) for row in here)
        middle_of = f"{number(here[0], 'cycles'):.2g}" if len({row["cycles"] for row in here}) == 1 else None
        page.chart(
            Chart(
                f"{pct:g} % cached: {count} of {len(here)} rules are safe, {len(best)} lie on the front (quality "
                "measured, time simulated)",
                "Change of bits per byte against the time of a token, a dot for each rule; the front's are named."
                + (f" The cache holds {middle_of} token cycles." if middle_of else ""),
                dots(
                    TPOT, CHANGE, TOLD, table=name, color=Field("family", "what is done"), names="shown",
                    x_scale={"type": "log", "domain": _around(here)},
                    y_scale={"type": "symlog", "constant": 1, "nice": False}, height=360,
                ),
                (name,),
                note="Left and low is better. Times are on a logarithmic scale, and so are changes beyond 1 %.",
            )
        )  # fmt: skip


def _around(rows: Sequence[Row]) -> list[float]:
    """Gives the ends of an axis of times, ms, with room beside the first and the last."""
    times = [1e3 * number(row, "tpot_s") for row in rows]
    return [0.8 * min(times), 2 * max(times)]


def _record(row: Row, best: bool) -> Record:
    return {
        "rule": str(row["rule"]), "family": family(row), "held": str(row["precisions"]),
        "tpot": 1e3 * number(row, "tpot_s"), "change": number(row, "change_pct"), "error": number(row, "change_se_pct"),
        "kl": number(row, "kl_nats"), "changed": 100 * number(row, "changed_tokens"),
        "hit": 100 * number(row, "hit_rate"),
        "copied": 100 * number(row, "copied_share"), "shown": str(row["rule"]) if best else "",
    }  # fmt: skip
