"""What `experiments.offload` prints, from its table alone: measured beside predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.reader import ROWS, read_rows
from specmd_jax.report.rows import number
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
    """Gives the rows as text for a terminal, times in milliseconds."""
    rows = read_rows(out)
    return f"{_text(rows)}\n{out / ROWS}"


def _text(rows: Sequence[Row]) -> str:
    first = rows[0]
    lossy = first["kl_nats"] is not None
    head = (*HEAD, *HEAD_TIMES, *(HEAD_LOSSY if lossy else ()))
    rule = f"miss rule: {first['miss']}, routing: {first['routing']}"
    held = f"engine: {first['engine']}, {rule}, experts held as: {first['precisions']}"
    lines = [held if first["batch"] == 1 else f"{held}, {first['batch']} requests decoded together"]
    lines += aligned(head, [_cells(row) + (_off(row) if lossy else ()) for row in rows])
    for time in TIMES:
        errors = [abs(number(row, f"{time}_error")) for row in rows]
        within = sum(error <= CLOSE for error in errors)
        lines.append(
            f"{time} error: {within} of {len(errors)} within {100 * CLOSE:.0f} %, worst {100 * max(errors):.0f} %"
        )
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
