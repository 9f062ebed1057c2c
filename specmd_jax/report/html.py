"""The HTML file of a page: its frame, its choices and its data, with everything that it needs inside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from specmd_jax.report import style
from specmd_jax.report.charts import SERIES, Chart, Field, Record
from specmd_jax.report.columns import Scalar
from specmd_jax.report.style import Look

DIGITS = 6  # significant ones of a number in a page; the table beside it has all
_PROGRAMS = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")  # versions and licences: assets/LICENSES.txt


@dataclass
class Parts:
    """What the script of a page works with."""

    tables: dict[str, list[Record]] = field(default_factory=dict)
    filters: dict[str, str] = field(default_factory=dict)
    looks: dict[str, Look] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    series_label: str = ""
    series_note: str = ""
    charts: list[Chart] = field(default_factory=list)
    sheets: list[tuple[str, list[Field]]] = field(default_factory=list)


def whole(title: str, top: str, body: str, side: str, data: str) -> str:
    """Gives the file: what is above the choices (`side`), and what is beside them. The programs that draw are left out
    where nothing is drawn.
    """
    drawn = "" if '"charts":[]' in data else "".join(f"<script>{_asset(name)}</script>\n" for name in _PROGRAMS)
    aside = f'<aside aria-label="What is shown">{side}</aside>' if side else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>\n<style>{_asset('page.css')}</style></head>\n<body>\n"
        '<a class="skip" href="#content">To the content</a>\n'
        '<header><p>specmd-jax</p><button type="button" id="theme" hidden>Dark</button></header>\n'
        f'<main id="content" tabindex="-1"><h1>{escape(title)}</h1>\n{top}\n'
        "<noscript><p>Charts and choices need JavaScript; the text and its tables do not.</p></noscript>\n"
        f'<div class="frame{" with-side" if side else ""}">{aside}<div class="blocks">{body}</div></div></main>\n'
        f'<script type="application/json" id="data">{data}</script>\n{drawn}<script>{_asset("page.js")}</script>\n'
        "</body></html>\n"
    )


def origin(found: Mapping[str, str]) -> str:
    """Says where a table comes from."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in found.items())
    summary = "<summary>Command, versions, settings</summary>"
    return f"<h2>Where this comes from</h2>\n<details>{summary}<dl>{items}</dl></details>"


def choices(parts: Parts) -> str:
    """Gives the choices of a page: a list for each field with several values, a checkbox for each series."""
    found: list[str] = []
    for name, label in parts.filters.items():
        every = (record.get(name) for table in parts.tables.values() for record in table)
        values = [value for value in dict.fromkeys(every) if value is not None]
        if len(values) < 2:
            continue
        texts = [_text(value) for value in values]
        free = [] if label.endswith("!") else ['<option value="">all</option>']
        options = [*free, *(f'<option value="{at}">{escape(text)}</option>' for at, text in enumerate(texts))]
        held = escape(json.dumps([_short(value) for value in values]))
        found.append(
            f'<label>{escape(label.rstrip("!"))}<select data-filter="{escape(name)}" data-values="{held}">'
            f"{''.join(options)}</select></label>"
        )
    if parts.looks:
        boxes = "".join(_box(name, look, name in parts.named) for name, look in parts.looks.items())
        note = f'<p class="note">{escape(parts.series_note)}</p>' if parts.series_note else ""
        found.append(
            f'<fieldset id="series"><legend>{escape(parts.series_label)}</legend>{note}<div class="boxes">{boxes}</div>'
            '<p class="buttons"><button type="button" data-choose="first">as at first</button>'
            '<button type="button" data-choose="all">all</button><button type="button" data-choose="none">none</button>'
            '</p><label class="box"><input type="checkbox" id="only">hide the others</label></fieldset>'
        )
    return "".join(found)


def _box(name: str, look: Look, chosen: bool) -> str:
    dash = " ".join(f"{part:g}" for part in look.dash)
    return (
        f'<label class="box"><input type="checkbox" data-series="{escape(name)}"{" checked" if chosen else ""}>'
        f'<svg width="26" height="8" aria-hidden="true" style="--l:{look.hue.light};--d:{look.hue.dark}">'
        f'<line x1="0" x2="26" y1="4" y2="4" stroke-dasharray="{dash}"/></svg>{escape(name)}</label>'
    )


def embedded(parts: Parts) -> str:
    """Gives what the script needs as JSON that can stand inside HTML."""
    told: dict[str, Any] = {
        "tables": {name: _columns(records) for name, records in parts.tables.items()},
        "looks": {
            name: {"light": look.hue.light, "dark": look.hue.dark, "dash": list(look.dash)}
            for name, look in parts.looks.items()
        },
        "hues": {theme: [getattr(hue, theme) for hue in style.HUES] for theme in ("light", "dark")},
        "named": parts.named,
        "charts": [{"spec": c.spec, "tables": list(c.tables), "ends": c.ends} for c in parts.charts],
        "sheets": [{"table": name, "fields": [it._asdict() for it in fields]} for name, fields in parts.sheets],
        "series": SERIES,
    }
    return json.dumps(told, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _columns(records: Sequence[Record]) -> dict[str, Any]:
    """Gives a table column by column; words as places in a list, so that a long table stays small."""
    names = list(records[0]) if records else []
    found: dict[str, Any] = {}
    for name in names:
        values = [_short(record[name]) for record in records]
        levels = list(dict.fromkeys(values))
        if 2 * len(levels) < len(values):
            place = {level: at for at, level in enumerate(levels)}
            found[name] = {"levels": levels, "at": [place[value] for value in values]}
        else:
            found[name] = {"values": values}
    return {"rows": len(records), "columns": found}


def _short(value: Scalar) -> Scalar:
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _text(value: Scalar) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _asset(name: str) -> str:
    text = files("specmd_jax.report").joinpath("assets", name).read_text(encoding="utf-8")
    return re.sub(r"\n//# sourceMappingURL=\S*", "", text)
