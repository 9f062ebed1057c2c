"""What `experiments.offload` says of a prompt that it completed, from one row alone: measured beside simulated."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.document import Document, Said
from specmd_jax.report.reader import ROWS, read_manifest, read_rows
from specmd_jax.report.rows import mix_name, number
from specmd_jax.units import GIB, MIB

COLUMNS = {
    "model": Column("str", "model"),
    "engine": Column("str", "layerwise: layer by layer from the host; fused: one program per pass"),
    "eviction": Column("str", "eviction policy"),
    "prefetch": Column("str", "prefetch policy"),
    "miss": Column("str", "miss rule"),
    "precisions": Column("str", "what the host holds of each expert, by rising bits"),
    "prompt_tokens": Column("int", "tokens of the prompt"),
    "new_tokens": Column("int", "tokens made"),
    "ended": Column("bool", "the model ended the text itself"),
    "ttft_s": Column("float", "measured time to the first token from an empty cache, seconds"),
    "tpot_s": Column("float", "measured mean time of a later token, seconds"),
    "hit_rate": Column("float", "measured hits / demand of decode passes, 0 to 1"),
    "copy_bytes_per_token": Column("float", "measured bytes of experts copied a decode pass, on demand and ahead"),
    "simulated_ttft_s": Column("float", "the simulator's time to the first token on the recorded routing, seconds"),
    "simulated_tpot_s": Column("float", "its mean time of a later token, seconds"),
    "simulated_hit_rate": Column("float", "its hits / demand of decode passes, 0 to 1"),
    "simulated_copy_bytes_per_token": Column("float", "its bytes of experts copied a decode pass"),
    "rates": Column("str", "where the simulator's rates come from, or why it has none"),
    "events_equal": Column("bool", "every event of the run is the simulator's on the recorded routing"),
    "slots": Column("int", "experts that the cache holds, at the highest precision"),
    "experts": Column("int", "routed experts of the model"),
    "most_resident": Column("int", "experts on the device at once, those of the visit under way included"),
    "memory_bytes": Column("int", "memory that was divided; empty where the size of the cache was given"),
    "expert_bytes": Column("int", "of one expert, at the highest precision"),
    "place_bytes": Column("int", "what one takes on the device, the rest of its last page included"),
    "dense_bytes": Column("int", "all weights on the device but those of experts"),
    "kv_bytes": Column("int", "keys and values of all positions"),
    "work_bytes": Column("int", "set aside for what passes compute with and leave behind: an estimate"),
    "staging": Column("int", "places for experts on the device beside the cache"),
    "evidence": Column("str", "measured and simulated, as each column says"),
}
KEY = ("model", "engine", "eviction", "prefetch", "miss", "precisions", "slots")
TABLE = Table("completion", COLUMNS, KEY)
NONE = "-"
_NAMES, _CELLS = 38, 12  # widths


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; gives the numbers of each prompt as text for a terminal."""
    rows = read_rows(out)
    first = rows[0]
    page = Document(
        f"{first['model']} makes {_per_second(number(first, 'tpot_s'))} tokens/s (measured) with {first['slots']} of "
        f"{first['experts']} experts on the device",
        read_manifest(out),
    )
    page.answer([Said(told(row), "measured and simulated") for row in rows])
    for row in rows:
        page.verbatim("\n".join(block(row)))
    paths = page.save(out)
    return "\n\n".join([*("\n".join(block(row)) for row in rows), "\n".join(map(str, [*paths, out / ROWS]))])


def told(row: Row) -> str:
    """Says of one prompt how fast it was, beside what the simulator says."""
    words = f"{mix_name(str(row['eviction']), str(row['prefetch']))}: "
    return words + "; ".join(
        f"{said} {measured} measured, {simulated} simulated"
        for said, (measured, simulated) in ((said, _both(row, name, text)) for said, name, text in FIGURES)
    )


def block(row: Row) -> list[str]:
    """Gives the lines that say of one prompt how fast it was, what was simulated, and how memory was divided."""
    mix = mix_name(str(row["eviction"]), str(row["prefetch"]))
    rule = "" if row["miss"] == "fetch" else f", miss rule {row['miss']}"
    ended = "ended by the model" if row["ended"] else "as many as asked for"
    lines = [
        f"{row['model']} ({row['precisions']}), {row['engine']} engine, {mix}{rule}",
        f"{row['prompt_tokens']} tokens of prompt, {row['new_tokens']} new ({ended})",
        _line("", "measured", "simulated"),
        *(_line(said, *_both(row, name, text)) for said, name, text in FIGURES),
        f"simulated: the recorded routing; {row['rates']}",
        f"experts in the cache: {row['slots']} of {row['experts']} ({_share(row)}); at most {row['most_resident']} on "
        "the device at once (measured)",
        *_memory(row),
    ]
    if not row["events_equal"]:
        lines.append("! events differ from the simulator's")
    return lines


def _memory(row: Row) -> list[str]:
    """Says how device memory is divided."""
    size, staging = number(row, "place_bytes"), number(row, "staging")
    parts = {
        "dense weights": number(row, "dense_bytes"),
        "keys and values": number(row, "kv_bytes"),
        "work (estimated)": number(row, "work_bytes"),
        f"{staging:.0f} experts on their way": staging * size,
        f"{row['slots']} experts in the cache": number(row, "slots") * size,
    }
    given = number(row, "memory_bytes")
    of = "" if math.isnan(given) else f" of {_bytes(given)}"
    return [
        f"device memory: {_bytes(sum(parts.values()))}{of} (worked out from shapes)",
        *(_line(f"  {name}", _bytes(value)) for name, value in parts.items()),
    ]


def _line(name: str, *cells: str) -> str:
    return name.ljust(_NAMES) + "".join(cell.rjust(_CELLS) for cell in cells)


def _bytes(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.2f} MiB"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:,.1f} ms"


def _per_second(value: float) -> str:
    return f"{1 / value:,.2f}" if value else NONE


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


FIGURES = (
    ("time to the first token (empty cache)", "ttft_s", _milliseconds),
    ("tokens per second (decode)", "tpot_s", _per_second),
    ("hit rate (decode)", "hit_rate", _percent),
    ("copied per token (decode)", "copy_bytes_per_token", _bytes),
)


def _both(row: Row, name: str, text: Callable[[float], str]) -> tuple[str, str]:
    """Gives what was measured and what was simulated."""
    measured, simulated = (number(row, column) for column in (name, f"simulated_{name}"))
    return _cell(measured, text), _cell(simulated, text)


def _cell(value: float, text: Callable[[float], str]) -> str:
    return NONE if math.isnan(value) else text(value)


def _share(row: Row) -> str:
    return _percent(number(row, "slots") / number(row, "experts"))
