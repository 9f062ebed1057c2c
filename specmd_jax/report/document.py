"""A page made of blocks, as Markdown (pictures beside it) and as one self-contained HTML file."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from specmd_jax.files import replace_text
from specmd_jax.report.provenance import facts

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .4rem 0 1.6rem; font-variant-numeric: tabular-nums; font-size: 13.5px }
th, td { padding: .18rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; vertical-align: top }
th:first-child, td:first-child, td.words { text-align: left }
tr.faint { color: #777 } tr.strong { font-weight: 600 }
figure { margin: 0 }
img { max-width: 100%; height: auto; margin: .5rem 0 1.5rem }
.warning { background: #fff3d6; padding: .3rem .7rem; border-left: 4px solid #E69F00 }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; font-size: 13px }
dt { color: #777 } dd { margin: 0; overflow-wrap: anywhere }
"""
WORDS = 24  # a longer cell is read as text and set to the left
STRONG, FAINT = "strong", "faint"
UNFINISHED = "The run that made this table did not finish: cells are missing. The same command continues it."


@dataclass
class Document:
    """Blocks in order; each method adds one. The end says, by the manifest, where the table comes from."""

    title: str
    manifest: Mapping[str, Any]
    _markdown: list[str] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.manifest["complete"]:
            self.warning(UNFINISHED)

    def heading(self, text: str, level: int = 2) -> None:
        self._markdown.append(f"{'#' * level} {text}")
        self._html.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """Adds a paragraph."""
        self._markdown.append(text)
        self._html.append(f"<p>{escape(text)}</p>")

    def warning(self, text: str) -> None:
        """Adds a paragraph that must not be missed."""
        self._markdown.append(f"**{text}**")
        self._html.append(f'<p class="warning">{escape(text)}</p>')

    def bullets(self, items: Sequence[str]) -> None:
        self._markdown.append("\n".join(f"- {item}" for item in items))
        self._html.append("<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], marks: Mapping[int, str] | None = None) -> None:
        """Adds a table of text; the first column is a label. `marks` makes rows, by index, `STRONG` or `FAINT`."""
        marks = marks or {}
        lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        for index, mark in marks.items():
            if mark == STRONG:
                lines[index] = [f"**{cell}**" for cell in lines[index]]
        lines = [[cell.replace("|", "\\|") for cell in head], ["---"] + ["---:"] * (len(head) - 1), *lines]
        self._markdown.append("\n".join("| " + " | ".join(row) + " |" for row in lines))
        body = "".join(_row(row, marks.get(index)) for index, row in enumerate(rows))
        self._html.append("<table><tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + f"</tr>{body}</table>")

    def picture(self, path: Path, caption: str) -> None:
        """Adds a PNG file in a folder beside the page: linked in Markdown, embedded in HTML."""
        self._markdown.append(f"![{caption}]({path.parent.name}/{path.name})")
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        self._html.append(f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>')

    def save(self, folder: str | os.PathLike[str], name: str) -> list[Path]:
        """Writes ``name.md`` and ``name.html`` into `folder`; gives their paths."""
        paths = [Path(folder) / f"{name}.md", Path(folder) / f"{name}.html"]
        markdown, html = _origin(self.manifest)
        replace_text(paths[0], "\n\n".join([f"# {self.title}", *self._markdown, markdown]) + "\n")
        replace_text(
            paths[1],
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f"<style>{_STYLE}</style></head><body>\n<h1>{escape(self.title)}</h1>\n"
            + "\n".join([*self._html, html])
            + "\n</body></html>\n",
        )
        return paths


def _row(cells: Sequence[str], mark: str | None) -> str:
    return (f'<tr class="{mark}">' if mark else "<tr>") + "".join(map(_cell, cells)) + "</tr>"


def _cell(text: str) -> str:
    return f'<td class="words">{escape(text)}</td>' if len(text) > WORDS else f"<td>{escape(text)}</td>"


def _origin(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """Says where a table comes from, in Markdown and in HTML."""
    title, found = "Where this comes from", facts(manifest)
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in found.items())
    lines = "\n".join(f"- {name}: {text}" for name, text in found.items())
    return f"## {title}\n\n{lines}", f"<h2>{title}</h2>\n<dl>{items}</dl>"
