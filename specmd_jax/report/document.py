"""A page made of blocks: as Markdown for a terminal, and as one interactive HTML file that needs no server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from specmd_jax.files import replace_text
from specmd_jax.report.charts import Chart, Field, Record
from specmd_jax.report.html import Parts, choices, embedded, origin, whole
from specmd_jax.report.provenance import facts
from specmd_jax.report.style import Look

WORDS = 24  # a longer cell is read as text and set to the left
STRONG, FAINT = "strong", "faint"
UNFINISHED = "The run that made this table did not finish: cells are missing. The same command continues it."
PAGE = ("report.md", "report.html")
"""What every study's page is called."""


class Said(NamedTuple):
    """A sentence of the answer, and what its numbers are: measured, simulated or estimated."""

    text: str
    evidence: str = ""

    @property
    def kind(self) -> str:
        """Gives the evidence in one word, or several where numbers of several kinds stand side by side."""
        told = self.evidence.replace("predicted", "estimated")
        return " and ".join(kind for kind in ("measured", "simulated", "estimated") if kind in told)


def sentence(text: str, names: Iterable[str] = ()) -> str:
    """Begins a sentence with a capital, unless it begins with a name."""
    return text if text.startswith(tuple(names)) else text[:1].upper() + text[1:]


@dataclass
class Document:
    """Blocks in order; each method adds one. The end says, by the manifest, where the table comes from."""

    title: str
    manifest: Mapping[str, Any]
    _markdown: list[str] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)
    _parts: Parts = field(default_factory=Parts)
    _top: int = 0  # blocks above the choices: up to the answer

    def __post_init__(self) -> None:
        if not self.manifest["complete"]:
            self.warning(UNFINISHED)

    def heading(self, text: str, level: int = 2, *, html: bool = True) -> None:
        self._markdown.append(f"{'#' * level} {text}")
        if html:
            self._html.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """Adds a paragraph."""
        self._markdown.append(text)
        self._html.append(f"<p>{escape(text)}</p>")

    def warning(self, text: str, *, html: bool = True) -> None:
        """Adds a paragraph that must not be missed."""
        self._markdown.append(f"**{text}**")
        if html:
            self._html.append(f'<p class="warning">{escape(text)}</p>')

    def bullets(self, items: Sequence[str]) -> None:
        self._markdown.append("\n".join(f"- {item}" for item in items))
        self._html.append("<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>")

    def verbatim(self, text: str) -> None:
        """Adds lines whose columns are set by spaces."""
        self._markdown.append(f"```\n{text}\n```")
        self._html.append(f'<pre tabindex="0">{escape(text)}</pre>')

    def answer(self, said: Iterable[Said]) -> None:
        """Adds what the reader wants to know, each sentence with what its numbers are."""
        said = list(said)
        self._markdown.append("\n".join(f"- {it.text}" + (f" ({it.kind})" if it.kind else "") for it in said))
        items = "".join(f"<li>{_tag(it)}{escape(it.text)}</li>" for it in said)
        self._html.append(f'<section class="answer" aria-label="The answer"><ul>{items}</ul></section>')
        self._top = len(self._html)

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        marks: Mapping[int, str] | None = None,
        *,
        html: bool = True,
    ) -> None:
        """Adds a table of text; the first column is a label. `marks` makes rows, by index, `STRONG` or `FAINT`.

        Without `html` it is in the Markdown alone: the page has the same numbers in a table of its data.
        """
        marks = marks or {}
        lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        for index, mark in marks.items():
            if mark == STRONG:
                lines[index] = [f"**{cell}**" for cell in lines[index]]
        lines = [[cell.replace("|", "\\|") for cell in head], ["---"] + ["---:"] * (len(head) - 1), *lines]
        self._markdown.append("\n".join("| " + " | ".join(row) + " |" for row in lines))
        if not html:
            return
        body = "".join(_row(row, marks.get(index)) for index, row in enumerate(rows))
        heads = "".join(f'<th scope="col">{escape(c)}</th>' for c in head)
        self._html.append(
            f'<div class="sheet" data-sheet="text"><table><thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def picture(self, path: Path, caption: str) -> None:
        """Links a picture in a folder beside the page, in Markdown; the HTML page has a chart of the same."""
        self._markdown.append(f"![{caption}]({path.parent.name}/{path.name})")

    def data(self, name: str, records: Sequence[Record]) -> None:
        """Gives charts and tables of the page some records with the same keys. ``series`` is who a record is of."""
        self._parts.tables[name] = list(records)

    def filters(self, **labels: str) -> None:
        """Adds a choice for each field of the page's data, name=label, that has several values. It rules all charts
        and tables whose data have the field. A label that ends in ``!`` has no "all": one value is always chosen.
        """
        self._parts.filters |= labels

    def series(self, looks: Mapping[str, Look], named: Sequence[str], what: str, note: str = "") -> None:
        """Says how each series is drawn, in the order of its list, and which ones are chosen at first."""
        self._parts.looks, self._parts.named = dict(looks), list(named)
        self._parts.series_label, self._parts.series_note = what, note

    def chart(self, chart: Chart) -> None:
        """Adds a chart, whose title is what it shows."""
        self._parts.charts.append(chart)
        at = len(self._parts.charts) - 1
        self._markdown.append(f"**{chart.title}** {chart.words}" + (f" {chart.note}" if chart.note else ""))
        note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
        self._html.append(
            f'<figure class="{"wide" if chart.wide else "half"}" aria-labelledby="title-{at}">'
            f'<figcaption id="title-{at}">{escape(chart.title)}</figcaption>{note}'
            f'<div class="chart" id="chart-{at}" role="img" aria-label="{escape(f"{chart.title}. {chart.words}")}">'
            "</div><details><summary>In words</summary>"
            f"<p>{escape(chart.words)}</p></details></figure>"
        )

    def rows(self, name: str, fields: Sequence[Field], caption: str) -> None:
        """Adds a table of the page's data that can be sorted, is filtered with the charts, and can be saved as CSV."""
        self._parts.sheets.append((name, list(fields)))
        self._html.append(
            f'<div class="sheet" data-sheet="{len(self._parts.sheets) - 1}" data-caption="{escape(caption)}"></div>'
        )

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes ``report.md`` and ``report.html`` into `folder`; gives their paths."""
        markdown, html = (Path(folder) / name for name in PAGE)
        found = facts(self.manifest)
        lines = "\n".join(f"- {name}: {text}" for name, text in found.items())
        text = [f"# {self.title}", *self._markdown, f"## Where this comes from\n\n{lines}"]
        replace_text(markdown, "\n\n".join(text) + "\n")
        top, body = "\n".join(self._html[: self._top]), "\n".join([*self._html[self._top :], origin(found)])
        replace_text(html, whole(self.title, top, body, choices(self._parts), embedded(self._parts)))
        return [markdown, html]


def _tag(said: Said) -> str:
    if not said.kind:
        return ""
    return f'<span class="tag {said.kind.split()[0]}" title="{escape(said.evidence)}">{said.kind}</span> '


def _row(cells: Sequence[str], mark: str | None) -> str:
    return (f'<tr class="{mark}">' if mark else "<tr>") + "".join(map(_cell, cells)) + "</tr>"


def _cell(text: str) -> str:
    return f'<td class="words">{escape(text)}</td>' if len(text) > WORDS else f"<td>{escape(text)}</td>"
