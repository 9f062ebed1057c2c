"""What `experiments.offload` prints, from its table alone: measured beside predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specmd_jax.report.charts import Chart, Field, bars, dots
from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.document import Document, Said
from specmd_jax.report.reader import ROWS, read_manifest, read_rows
from specmd_jax.report.rows import mix_name, number
from specmd_jax.report.terminal import aligned

COLUMNS = {
    "model": Column("str", "model"),
    "engine": Column("str", "layerwise: layer by layer from the host; fused: one program per pass"),
    "eviction": Column("str", "eviction policy"),
    "capacity": Column("str", "cache size as asked for"),
    "prefetch": Column("str", "prefetch policy"),
    "miss": Column("str", "miss rule"),
    "routing": Column("str", "routing policy"),
    "precisions": Column("str", "what the host holds of each expert, by rising bits"),
    "batch": Column("int", "requests decoded together"),
    "capacity_slots": Column("int", "cache size in experts"),
    "most_resident": Column("int", "experts on the device at once, those of the visit under way included"),
    "hit_rate": Column("float", "hits / demand of decode passes, 0 to 1"),
    "copies_per_token": Column("float", "experts copied per decoded token, by demand and by prefetch"),
    "copy_bytes_per_token": Column("float", "their bytes"),
    "events_equal": Column("bool", "every event of the run is the simulator's on the recorded trace"),
    "ttft_s": Column("float", "measured time to the first token, seconds"),
    "tpot_s": Column("float", "measured time of a later token, seconds"),
    "tokens_per_s": Column("float", "tokens made per second, over all requests of the run"),
    "predicted_ttft_s": Column("float", "predicted time to the first token, seconds"),
    "predicted_tpot_s": Column("float", "predicted time of a later token, seconds"),
    "ttft_error": Column("float", "predicted / measured - 1"),
    "tpot_error": Column("float", "predicted / measured - 1"),
    "dropped_share": Column("float", "gate mass of dropped experts / all, in decode passes, 0 to 1"),
    "moved_share": Column("float", "gate mass of experts that others stood in for / all, in decode passes, 0 to 1"),
    "host_share": Column("float", "experts that the host computed / demand of decode passes, 0 to 1"),
    "changed_tokens": Column("float", "share of next tokens that are not the all-resident model's on its own text"),
    "kl_nats": Column("float", "mean KL divergence of the next token from the all-resident model's"),
    "perplexity": Column("float", "of the all-resident model's text"),
    "resident_perplexity": Column("float", "of the same text under the all-resident model (at the highest precision)"),
    "evidence": Column("str", "measured (times) and simulated (predictions)"),
}
KEY = ("model", "engine", "eviction", "capacity", "prefetch", "miss", "routing", "precisions", "batch")
TABLE = Table("offload", COLUMNS, KEY)

TIMES = ("ttft", "tpot")
HEAD = ("eviction", "capacity", "prefetch", "hit %", "copies", "tokens/s")
HEAD_TIMES = tuple(text for time in TIMES for text in (f"{time.upper()} ms", "predicted", "error"))
HEAD_LOSSY = ("tokens changed", "KL nats", "perplexity (resident)")
CLOSE = 0.05  # a prediction within this much of the measured time


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; gives the rows as text for a terminal, times in milliseconds."""
    rows = read_rows(out)
    page = Document(title(rows), read_manifest(out))
    said = answer(rows)
    page.answer(said)
    _views(page, rows)
    paths = page.save(out)
    return "\n".join([*(it.text for it in said), "", _text(rows), *map(str, paths), str(out / ROWS)])


def title(rows: Sequence[Row]) -> str:
    """States the fastest run that loses nothing."""
    best = fastest(rows)
    return (
        f"{best['model']}: {number(best, 'tokens_per_s'):.3g} tokens/s measured with {best['capacity']} of the experts "
        f"on the device, {_mix(best)}"
    )


def fastest(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: number(row, "tpot_s"))


def answer(rows: Sequence[Row]) -> list[Said]:
    """Gives how fast it was, what hit, and how far off predictions were."""
    best, slow = fastest(rows), max(rows, key=lambda row: number(row, "tpot_s"))
    said = [
        Said(
            f"{_mix(best)} at {best['capacity']} takes {1e3 * number(best, 'tpot_s'):.2f} ms a token "
            f"({number(best, 'tokens_per_s'):.3g} tokens/s, {1e3 * number(best, 'ttft_s'):.1f} ms to the first) and "
            f"hits {100 * number(best, 'hit_rate'):.1f} %, with {number(best, 'copies_per_token'):.1f} copies.",
            "measured",
        )
    ]
    if slow is not best:
        more = 100 * (number(slow, "tpot_s") / number(best, "tpot_s") - 1)
        said.append(
            Said(f"The slowest, {_mix(slow)} at {slow['capacity']}, takes {more:.0f} % more time a token.", "measured")
        )
    same = sum(bool(row["events_equal"]) for row in rows)
    said.append(
        Said(
            f"In {same} of {len(rows)} runs every hit, miss and eviction is what the simulator gives for the recorded "
            "routing.",
            "measured and simulated",
        )
    )
    told = [row for row in rows if row["tpot_error"] is not None]
    if told:
        errors = sorted(abs(number(row, "tpot_error")) for row in told)
        within = sum(error <= CLOSE for error in errors)
        said.append(
            Said(
                f"The predicted time of a token is {100 * errors[len(errors) // 2]:.0f} % off in the middle, within "
                f"{100 * CLOSE:.0f} % in {within} of {len(errors)} runs.",
                "measured and simulated",
            )
        )
    lossy = [row for row in rows if row["kl_nats"] is not None]
    if lossy:
        worst = max(lossy, key=lambda row: number(row, "changed_tokens"))
        said.append(
            Said(
                f"At most {100 * number(worst, 'changed_tokens'):.1f} % of the next tokens are others than the model's "
                f"with all experts ({_mix(worst)} at {worst['capacity']}).",
                "measured",
            )
        )
    return said


def _mix(row: Row) -> str:
    rule = "" if row["miss"] == "fetch" else f", {row['miss']}"
    return mix_name(str(row["eviction"]), str(row["prefetch"])) + rule


RUN = Field("series", "run")
TOLD = (
    RUN,
    Field("capacity", "cached"),
    Field("measured", "TPOT measured, ms", ",.3f"),
    Field("predicted", "predicted, ms", ",.3f"),
    Field("error", "error, %", "+.1f"),
    Field("ttft", "TTFT measured, ms", ",.2f"),
    Field("ttft_predicted", "predicted, ms", ",.2f"),
    Field("ttft_error", "error, %", "+.1f"),
    Field("rate", "tokens a second", ",.4~g"),
    Field("hit", "hit rate, %", ".1f"),
    Field("copies", "copies a token", ".2f"),
)


def _views(page: Document, rows: Sequence[Row]) -> None:
    """Adds measured beside predicted times, one against the other, and hits."""
    records = [
        {
            "series": _mix(row),
            "eviction": str(row["eviction"]),
            "prefetch": str(row["prefetch"]),
            "miss": str(row["miss"]),
            "engine": str(row["engine"]),
            "label": f"{_mix(row)}, {row['capacity']}",
            "capacity": str(row["capacity"]),
            "measured": 1e3 * number(row, "tpot_s"),
            "predicted": 1e3 * number(row, "predicted_tpot_s"),
            "error": 100 * number(row, "tpot_error"),
            "ttft": 1e3 * number(row, "ttft_s"),
            "ttft_predicted": 1e3 * number(row, "predicted_ttft_s"),
            "ttft_error": 100 * number(row, "ttft_error"),
            "rate": number(row, "tokens_per_s"),
            "hit": 100 * number(row, "hit_rate"),
            "copies": number(row, "copies_per_token"),
        }
        for row in rows
    ]
    page.data("rows", records)
    both = (("tpot", "measured", "predicted", "tpot_s"), ("ttft", "ttft", "ttft_predicted", "ttft_s"))
    choices = ("series", "eviction", "prefetch", "miss", "engine", "label", "capacity")
    for name, measured, predicted, _ in both:
        page.data(
            name,
            [
                {key: record[key] for key in choices} | {"what": what, "ms": record[column]}
                for record in records
                for what, column in (("measured", measured), ("simulated", predicted))
            ],
        )
    page.filters(engine="engine", eviction="eviction", prefetch="prefetch", miss="miss rule", capacity="cached")
    told = (Field("label", "run"), Field("what", "what"), Field("ms", "ms", ",.3f"))
    for (name, _, _, column), words in zip(both, ("a token", "to the first token"), strict=True):
        best = min(rows, key=lambda row: number(row, column))
        page.chart(
            Chart(
                f"{1e3 * number(best, column):.3g} ms {words} at best, measured, with {_mix(best)} at "
                f"{best['capacity']}; {1e3 * number(best, f'predicted_{column}'):.3g} ms simulated",
                f"{name.upper()} of each run, measured beside simulated.",
                bars(told[0], told[2], told, table=name, group=Field("what", "")), (name,),
            )
        )  # fmt: skip
    if len(rows) > 2:
        times = [record[column] for record in records for column in ("measured", "predicted")]
        ends = 0.8 * min(map(float, times)), 1.25 * max(map(float, times))  # type: ignore[arg-type]
        span = [ends[0] * (ends[1] / ends[0]) ** (step / 20) for step in range(21)]
        page.data("ideal", [{"at": at, "low": 0.95 * at, "high": 1.05 * at, "text": "5 %"} for at in span])
        log = {"type": "log", "domain": [span[0], span[-1]]}
        within = sum(abs(number(row, "tpot_error")) <= CLOSE for row in rows if row["tpot_error"] is not None)
        page.chart(
            Chart(
                f"{within} of {len(rows)} predictions of TPOT lie within 5 % of what was measured (simulated)",
                "Predicted against measured time of a token, with a band of 5 %.",
                dots(*TOLD[2:4], TOLD, color=Field("prefetch", "prefetch"), x_scale=log, y_scale=log, ideal="ideal"),
                ("rows", "ideal"),
            )
        )  # fmt: skip
    page.heading("All runs")
    page.rows("rows", TOLD, "Every run")


def _text(rows: Sequence[Row]) -> str:
    first = rows[0]
    lossy = first["kl_nats"] is not None
    head = (*HEAD, *HEAD_TIMES, *(HEAD_LOSSY if lossy else ()))
    rule = f"miss rule: {first['miss']}, routing: {first['routing']}"
    held = f"engine: {first['engine']}, {rule}, experts held as: {first['precisions']}"
    lines = [held if first["batch"] == 1 else f"{held}, {first['batch']} requests decoded together"]
    lines += aligned(head, [_cells(row) + (_off(row) if lossy else ()) for row in rows])
    if not all(row["events_equal"] for row in rows):
        lines.append("events differ from the simulator's in some rows")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    """Under `HEAD` and `HEAD_TIMES`."""
    times = [
        text
        for time in TIMES
        for text in (
            f"{1e3 * number(row, f'{time}_s'):.2f}",
            f"{1e3 * number(row, f'predicted_{time}_s'):.2f}",
            f"{100 * number(row, f'{time}_error'):+.1f} %",
        )
    ]
    names = (str(row["eviction"]), str(row["capacity"]), str(row["prefetch"]))
    return (
        *names,
        f"{100 * number(row, 'hit_rate'):.1f}",
        f"{number(row, 'copies_per_token'):.2f}",
        f"{number(row, 'tokens_per_s'):.1f}",
        *times,
    )


def _off(row: Row) -> tuple[str, ...]:
    """Says how far a row is off the resident model, under `HEAD_LOSSY`."""
    return (
        f"{100 * number(row, 'changed_tokens'):.1f} %",
        f"{number(row, 'kl_nats'):.4f}",
        f"{number(row, 'perplexity'):.2f} ({number(row, 'resident_perplexity'):.2f})",
    )
