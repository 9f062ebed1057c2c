"""One self-contained page of a result folder: tables and pictures in a single file. Imports no jax."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from specmd_jax.report.series import LOWER_BOUNDS, hardware_of, near, number, one_setting
from specmd_jax.report.table import Row
from specmd_jax.report.text import CAPACITIES_PCT, HEAD, best_online, size_line, small_cache_warning, table

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .4rem 0 1.6rem; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
tr.bound { color: #777 } tr.best { font-weight: 600 }
img { max-width: 100%; height: auto; margin: .5rem 0 1.5rem }
.warning { background: #fff3d6; padding: .3rem .7rem; border-left: 4px solid #E69F00 }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; font-size: 13px }
dt { color: #777 } dd { margin: 0; overflow-wrap: anywhere }
"""


def page(
    manifest: Mapping[str, Any],
    sections: Sequence[tuple[Sequence[Row], Sequence[Path]]],
    capacities_pct: Sequence[float] = CAPACITIES_PCT,
) -> str:
    """HTML text. Each section is the rows of one setting and the PNG files to show with them, which are embedded."""
    body = [_section(rows, pictures, capacities_pct) for rows, pictures in sections]
    unfinished = (
        ""
        if manifest["complete"]
        else '<p class="warning">The run did not finish: cells are missing. The same command continues it.</p>'
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>specmd-jax: expert cache sweep</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>Expert cache sweep</h1>\n{unfinished}\n"
        + "\n".join(body)
        + f"\n<h2>Where this comes from</h2>\n{_provenance(manifest)}\n</body></html>\n"
    )


def _section(rows: Sequence[Row], pictures: Sequence[Path], capacities_pct: Sequence[float]) -> str:
    parts = [f"<h2>{escape(one_setting(rows).title)}</h2>"]
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        parts.append(f'<img alt="{escape(path.stem.replace("_", " "))}" src="data:image/png;base64,{data}">')
    for capacity in near(rows, capacities_pct):
        parts.append(_table([row for row in rows if number(row, "capacity_bytes") == capacity]))
    parts.append("<p>* sees the future: a bound, not a policy to run. The best policy that does not is in bold.</p>")
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    head = [*HEAD, *(f"tok/s {kind}" for kind in hardware_of(rows))]
    best = best_online(rows)
    lines = [f"<h3>{escape(size_line(rows[0]))}</h3>"]
    if warning := small_cache_warning(rows[0]):
        lines.append(f'<p class="warning">{escape(warning)}</p>')
    lines.append("<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    for cells in table(rows):
        name = cells[0].removesuffix(" *")
        mark = "bound" if name in LOWER_BOUNDS else "best" if best is not None and name == best["eviction"] else ""
        lines.append(f'<tr class="{mark}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _provenance(manifest: Mapping[str, Any]) -> str:
    facts = {
        "command": manifest.get("command"),
        "started": manifest.get("started"),
        "finished": manifest.get("finished"),
        "commit": manifest.get("git_commit"),
        "trace, SHA-256": manifest.get("trace_sha256"),
        **{f"version of {name}": text for name, text in manifest.get("versions", {}).items()},
        **{f"setting {name}": value for name, value in manifest["config"].items()},
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_shown(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
