"""The page of `experiments.study`, drawn from its table and cells: who is best where, what it gains, what it cost."""

from __future__ import annotations

from pathlib import Path

from specmd_jax.report.columns import Row
from specmd_jax.report.document import Document, Said, sentence
from specmd_jax.report.figures import save
from specmd_jax.report.pages.run.table import looked_into
from specmd_jax.report.pages.study.findings import findings, price, some, title
from specmd_jax.report.pages.study.picture import picture
from specmd_jax.report.pages.study.table import cost_of, first_of, places
from specmd_jax.report.pages.study.views import views
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import mix_name, number
from specmd_jax.units import GB


def draw(out: Path) -> str:
    """Writes report.md, report.html and figures/*.png into `out`; the findings as text for a terminal."""
    manifest, every, cost = read_manifest(out), places(read_rows(out)), cost_of(out)
    config = manifest["config"]
    page = Document(title(every), manifest)
    found = findings(every)
    evidence, names = str(first_of(every[0])["evidence"]), [mix_name(*mix) for mix in every[0].rows]
    page.answer([*(Said(sentence(line, names), evidence) for line in found), Said(price(cost), "measured")])
    page.text(
        f"Simulated on recorded routing ({config['tokens'] or 'all'} tokens, event contract, one pool, decode passes "
        f"of one request at a time); {config['hardware']} but for the link's rate. TPOT is the mean time of a decode "
        "pass. A place is a capacity with a link. Values were chosen and judged on the same tokens: what tuning gains "
        "is an upper bound of what it would gain on others."
    )
    views(page, every)
    page.picture(save(picture(every, config), out, "places"), "best mix, and what it gains")
    mixes = list(every[0].rows)
    page.heading("Some places", html=False)
    page.table(
        ("cache", "link GB/s", *(f"{mix_name(*mix)}, ms" for mix in mixes), "best"),
        [
            [
                f"{number(first_of(place), 'capacity_pct'):.1f} % (C/T {number(first_of(place), 'cycles'):.2f})",
                f"{place.link_bytes_per_s / GB:.1f}",
                *(shown(place.rows[mix]) for mix in mixes),
                mix_name(*place.best),
            ]
            for place in some(every)
        ],
        html=False,
    )
    middle = every[len(every) // 2]
    page.text(looked_into(config["trace"], middle.rows[middle.best]))
    return "\n".join([*found, price(cost), *map(str, page.save(out))])


def shown(row: Row) -> str:
    value = "" if row["number"] is None else f" ({row['number']} {number(row, 'value'):.2f})"
    return f"{1e3 * number(row, 'tpot_s'):.2f}{value}"
