"""What `experiments.capture` prints of its timings, from its table alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from specmd_jax.report.charts import Chart, Field, bars
from specmd_jax.report.columns import Column, Table
from specmd_jax.report.document import Document, Said
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number, values

COLUMNS = {
    "repeat": Column("int", "counts from 0; each has a timing with hooks and one without"),
    "hooks": Column("bool", "whether the routers were recorded"),
    "tpot_s": Column("float", "seconds per decoded token, without the prompt"),
    "evidence": Column("str", "measured"),
}
KEY = ("repeat", "hooks")
TABLE = Table("capture", COLUMNS, KEY)


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; gives a terminal's text: median and range of a token's time without
    and with hooks, and what they add.
    """
    rows, tokens = read_rows(out), read_manifest(out)["config"]["timed_tokens"]
    without, hooked = (
        1e3 * values([row for row in rows if row["hooks"] is hooks], "tpot_s") for hooks in (False, True)
    )
    pairs = min(len(without), len(hooked))
    ratios = (hooked[:pairs] / without[:pairs] - 1) * 100
    lines = [
        f"{name}  {np.median(ms):.3f} ms ({ms.min():.3f} to {ms.max():.3f})"
        for name, ms in (("TPOT alone  ", without), ("TPOT hooked ", hooked))
    ]
    overhead = (np.median(hooked) / np.median(without) - 1) * 100
    noise = "; not to be told from noise" if ratios.min() <= 0 else ""
    lines.append(
        f"overhead      {overhead:+.2f} % of the medians ({ratios.min():+.2f} to {ratios.max():+.2f} % pair by pair"
        f"{noise}), measured: {pairs} pairs of {tokens} tokens"
    )
    page = Document(f"Recording the routers costs {overhead:+.1f} % of a token's time (measured)", read_manifest(out))
    page.answer([Said(" ".join(text.split()), "measured") for text in reversed(lines)])
    told = [Field("repeat", "repeat", "d"), Field("hooks", "hooks"), Field("ms", "ms a token", ".3f")]
    page.data(
        "rows",
        [
            {"repeat": row["repeat"], "hooks": "hooked" if row["hooks"] else "alone", "ms": 1e3 * number(row, "tpot_s")}
            for row in rows
        ],
    )
    page.filters(hooks="hooks")
    words = "Time of a token in each repeat, alone and with the routers recorded."
    spec = bars(told[0], told[2], told, group=told[1], order="ascending")
    page.chart(Chart("Time of a token, alone and hooked (measured)", words, spec))
    page.rows("rows", told, "Every timing")
    page.save(out)
    return "\n".join(lines)
