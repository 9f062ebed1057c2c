"""A page made of blocks, as Markdown (pictures beside it) and as one self-contained HTML file. Imports no jax."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from specmd_jax.files import replace_text

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .4rem 0 1.6rem; font-variant-numeric: tabular-nums; font-size: 13.5px }
th, td { padding: .18rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; vertical-align: top }
th:first-child, td:first-child, td.words { text-align: left }
img { max-width: 100%; height: auto; margin: .5rem 0 1.5rem }
"""
WORDS = 24  # a longer cell is read as text and set to the left


@dataclass
class Document:
    """Blocks in order; each method adds one."""

    title: str
    _markdown: list[str] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)

    def heading(self, text: str, level: int = 2) -> None:
        self._markdown.append(f"{'#' * level} {text}")
        self._html.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._markdown.append(text)
        self._html.append(f"<p>{escape(text)}</p>")

    def bullets(self, items: Sequence[str]) -> None:
        self._markdown.append("\n".join(f"- {item}" for item in items))
        self._html.append("<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Cells are text already; the first column is a label."""
        lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
        self._markdown.append(
            "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
        )
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        self._html.append("<table><tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + f"</tr>{body}</table>")

    def picture(self, path: Path, caption: str) -> None:
        """A PNG file in a folder beside the page: linked in Markdown, embedded in HTML."""
        self._markdown.append(f"![{caption}]({path.parent.name}/{path.name})")
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        self._html.append(f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>')

    def provenance(self, manifest: Mapping[str, Any]) -> None:
        """Where a table comes from, by its manifest."""
        self.heading("Where this comes from")
        facts = {key: manifest.get(key) for key in ("command", "finished", "git_commit", "trace_sha256")}
        facts |= {f"setting {key}": value for key, value in manifest["config"].items()}
        self.bullets([f"{key}: {value}" for key, value in facts.items()])

    def save(self, folder: str | os.PathLike[str], name: str) -> list[Path]:
        """Write ``name.md`` and ``name.html`` into `folder`; their paths."""
        paths = [Path(folder) / f"{name}.md", Path(folder) / f"{name}.html"]
        replace_text(paths[0], "\n\n".join([f"# {self.title}", *self._markdown]) + "\n")
        replace_text(
            paths[1],
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f"<style>{_STYLE}</style></head><body>\n<h1>{escape(self.title)}</h1>\n"
            + "\n".join(self._html)
            + "\n</body></html>\n",
        )
        return paths


def _cell(text: str) -> str:
    return f'<td class="words">{escape(text)}</td>' if len(text) > WORDS else f"<td>{escape(text)}</td>"
