"""Pages on made-up tables: one file each, small, nothing from the network, the answer first. One real browser looks."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from matplotlib.image import imread
from test_report import made_up_row, made_up_rows, write

from specmd_jax.report import figures, style
from specmd_jax.report.charts import Chart, Field, dots
from specmd_jax.report.document import Document, Said
from specmd_jax.report.pages.sweep.counts import write_counts
from specmd_jax.report.pages.sweep.table import COUNTS
from specmd_jax.report.studies import redraw

DATA = Path(__file__).parent / "data" / "pages"
MOST_BYTES = 3_000_000
LOADS = re.compile(r"""<(?:script|img|link|iframe)[^>]*\s(?:src|href)=["'](?!data:)|@import|url\(""")


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DPI", 30)


def checked(page: Path) -> str:
    """Gives the text of a page that keeps the rules of all pages."""
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < MOST_BYTES
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)  # the programs: their own words, nothing loaded
    assert not LOADS.search(own), LOADS.search(own)
    assert '<meta name="viewport"' in text and 'class="skip"' in text
    answer = text.index('class="answer"')
    assert text.index("<h1>") < answer < text.index('class="frame')  # before choices, charts and tables
    assert not re.search(r"(?i)\bnan\b|Infinity", own)
    return text


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_papers_page_judges_quality_by_what_a_model_read(tmp_path: Path) -> None:
    shutil.copytree(DATA / "paper", tmp_path, dirs_exist_ok=True)
    redraw(tmp_path)
    before = (tmp_path / "report.md").read_text()
    shutil.copytree(DATA / "quality", tmp_path / "quality" / "specmd-reference")
    redraw(tmp_path)
    after = (tmp_path / "report.md").read_text()
    assert "Substitution collapses quality" in before and "quality measured" not in before
    (line,) = [it for it in after.splitlines() if it.startswith("| Dropping is safe from rank 3 on |")]
    assert line.endswith("| not testable here | - | reproduced | 3 / 3 / 3 |")
    assert "## Quality on held-out text: specmd-reference" in after
    assert (tmp_path / "figures" / "quality_specmd-reference.png").is_file()
    charts = data_of(checked(tmp_path / "report.html"))["charts"]
    assert [it["tables"] for it in charts][-3:] == [["quality_1"], ["quality_5"], ["quality_25"]]


def test_a_sweeps_page_answers_first_and_has_its_cells(tmp_path: Path) -> None:
    write(tmp_path, made_up_rows("rtx4090", "phone"))
    write_counts(tmp_path / COUNTS, [[5, 1, 2, 0], [2, 4, 1, 1]])
    redraw(tmp_path)
    text = checked(tmp_path / "report.html")
    assert "<h1>toy: least_stale misses least at every cache size</h1>" in text
    assert "With 25 % of the experts cached (2.32 GiB, 2.00 token cycles) least_stale hits 35.0 %, lru 25.0 %" in text
    assert 'class="tag simulated"' in text and "On phone there: least_stale " in text
    data = data_of(text)
    assert data["tables"]["rows"]["rows"] == 5 * 7 * 2
    assert set(data["named"]) == {"lru", "lfu", "least_stale", "belady", "belady_bypass"}
    assert len(data["charts"]) == 6
    assert 'data-filter="hardware"' in text and 'data-filter="setting"' not in text  # one value: nothing to choose
    assert re.search(r"\*\*Hit rate: .*\(simulated\)\*\*", (tmp_path / "report.md").read_text())


def test_a_trained_policy_is_never_the_best_without_a_word(tmp_path: Path) -> None:
    rows = made_up_rows()
    rows += [made_up_row("learned", 192, hits=990_000, misses=10_000, hit_rate=0.99)]
    write(tmp_path, rows)
    redraw(tmp_path)
    text = checked(tmp_path / "report.html")
    assert "<h1>toy: least_stale misses least" in text
    assert "learned hits 99.0 % there, but its weights were trained beforehand and may have seen these" in text
    assert text.count("never counted as best") >= 1


def test_a_long_table_is_thinned_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specmd_jax.report.pages.sweep import views

    monkeypatch.setattr(views, "MOST", 12)
    write(tmp_path, made_up_rows())
    redraw(tmp_path)
    text = checked(tmp_path / "report.html")
    assert "One in 3 cache sizes is here; all of them are in rows.csv." in text
    assert data_of(text)["tables"]["rows"]["rows"] < 35


STUDIES = {  # of tests/data/pages: charts at least, and words of the title
    "recommend": (5, "Run least_stale: 50.5 tokens/s of gpt-oss-20b in 6 GiB on pcie4-x16"),
    "study": (3, "lfu_decay is fastest, or ties, at 6 of 6 caches and links"),
    "starts": (2, "begun with a profile&#x27;s most used experts, lru misses 45 % fewer with 50 % cached"),
    "validate": (2, "Predicted tokens per second are 1.8 % off in the median of 19 published measurements"),
    "quality": (
        3,
        "substitute within 0.1 is the fastest rule within 2 % of the bits per byte with 5 % cached, 73 % less",
    ),
    "paper": (6, "that can be tested are reproduced"),
    "least_stale": (2, "fewer misses in"),
    "offload": (2, "tiny: 230 tokens/s measured with 50% of the experts on the device, lru"),
    "evaluate_learned": (2, "On requests that it never saw, learned closes at most"),
    "learn_policy": (1, "found by gradient save"),
    "benchmark": (0, "(measured)"),
}


@pytest.mark.parametrize("study", STUDIES)
def test_every_studys_page_states_a_finding_and_has_its_charts(study: str, tmp_path: Path) -> None:
    """Tables of smoke runs, as their studies wrote them."""
    shutil.copytree(DATA / study, tmp_path, dirs_exist_ok=True)
    redraw(tmp_path)
    text = checked(tmp_path / "report.html")
    charts, words = STUDIES[study]
    found = re.search(r"<h1>(.*?)</h1>", text)
    assert found and words in found[1]
    data = data_of(text)
    assert len(data["charts"]) == text.count('class="chart"') >= charts
    names = {name for chart in data["charts"] for name in chart["tables"]}
    assert names <= data["tables"].keys() and all(data["tables"][name]["rows"] for name in names)
    assert re.search(r'class="tag (measured|simulated|estimated)"', text)
    assert (tmp_path / "report.md").read_text().startswith("# ")


def test_words_of_others_cannot_break_a_page(tmp_path: Path) -> None:
    manifest = {"complete": True, "config": {"trace": "</script><b>"}}
    page = Document("<b>", manifest)
    page.answer([Said("a < b", "measured")])
    page.data("rows", [{"series": "</script><script>alert(1)</script>", "x": float("nan"), "y": float("inf")}])
    page.series(style.categories(["</script>"]), [], "what")
    page.chart(Chart("t<", 'w"', dots(Field("x", "x"), Field("y", "y"), ())))
    page.save(tmp_path)
    text = checked(tmp_path / "report.html")
    assert "alert(1)</script>" not in text and "<b>" not in text
    assert data_of(text)["tables"]["rows"]["columns"]["x"] == {"values": [None]}


def test_colours_are_told_apart_with_any_vision_on_either_ground() -> None:
    """Distances in OKLab of what protanopes, deuteranopes and tritanopes see (Machado and others, 2009)."""
    seen = {
        "all": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    for theme, ground in (("light", "#ffffff"), ("dark", "#15191d")):
        colors = np.array([_linear(getattr(hue, theme)) for hue in style.HUES])
        light = (colors @ [0.2126, 0.7152, 0.0722] + 0.05) / (_linear(ground) @ [0.2126, 0.7152, 0.0722] + 0.05)
        assert (np.maximum(light, 1 / light) >= 3).all(), theme  # what WCAG asks of lines
        for vision, matrix in seen.items():
            found = _oklab(np.clip(colors @ np.transpose(matrix), 0, 1))
            apart = np.linalg.norm(found[:, None] - found[None], axis=-1) + 9 * np.eye(len(found))
            assert apart.min() > 0.07, (theme, vision)


def _linear(color: str) -> np.ndarray:
    parts = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray) -> np.ndarray:
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
              [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.cbrt(linear @ np.transpose(to_lms)) @ np.transpose(to_lab)


# ----------------------------------------------------------------------------------------------------- a real browser


@pytest.mark.slow
def test_a_browser_shows_filters_sorts_and_fits_a_phone(tmp_path: Path) -> None:
    program = chromium.found()
    if program is None:
        pytest.skip(f"no browser: expected one of {', '.join(chromium.NAMES)} on the PATH")
    slow = [row | {"stall_s": 9 * float(str(row["stall_s"]))} for row in made_up_rows("phone")]
    write(tmp_path / "out", [*made_up_rows("rtx4090"), *slow])
    write_counts(tmp_path / "out" / COUNTS, [[5, 1, 2, 0], [2, 4, 1, 1]])
    redraw(tmp_path / "out")
    with chromium.browsing(program, tmp_path / "profile") as tab:
        tab.open(tmp_path / "out" / "report.html")
        assert tab.errors == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
        charts = tab.run("document.querySelectorAll('.chart').length")
        assert tab.run("document.querySelectorAll('.chart canvas').length") == charts == 6
        for at in range(charts):
            assert _ink(tab, at) > 0.01, f"chart {at} is blank"

        shown = _pixels(tab, 1)
        tab.run("(() => { const s = document.querySelector('[data-filter=hardware]'); s.value = '1';"
                "s.dispatchEvent(new Event('change')); })()")  # fmt: skip
        tab.drawn(2)
        assert _pixels(tab, 1).shape != shown.shape or (_pixels(tab, 1) != shown).any()
        rows = "[...document.querySelectorAll('.sheet table')[0].tBodies[0].rows].map((r) => r.cells[0].textContent)"
        assert len(tab.run(rows)) == 35
        chosen = _pixels(tab, 0)
        tab.run("document.querySelector('[data-series=lru]').click()")
        tab.drawn(3)
        assert (_pixels(tab, 0) != chosen).any()  # lru is grey now
        tab.run("document.getElementById('only').click()")
        tab.drawn(4)
        assert len(tab.run(rows)) == 28 and "lru" not in tab.run(rows)

        hits = "[...document.querySelectorAll('.sheet table')[0].tBodies[0].rows].map((r) => +r.cells[4].textContent)"
        tab.run("document.querySelectorAll('.sheet table')[0].querySelectorAll('th button')[4].click()")
        assert tab.run(hits) == sorted(tab.run(hits), reverse=True)
        tab.run("document.querySelectorAll('.sheet table')[0].querySelectorAll('th button')[4].click()")
        assert tab.run(hits) == sorted(tab.run(hits))
        assert tab.run("document.querySelectorAll('th[aria-sort]').length") == 1

        box = "document.querySelector('#chart-0 canvas').getBoundingClientRect()"
        tab.run("document.querySelector('#chart-0 canvas').scrollIntoView({block: 'center'})")
        place = tab.run(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
        for step in range(3):
            tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0] + step, y=place[1])
        told = tab.run("new Promise((d) => setTimeout(() => d(document.getElementById('vg-tooltip-element')"
                       "?.innerText || ''), 300))")  # fmt: skip
        assert "policy" in told and "hit rate" in told

        tab.run("document.getElementById('theme').click()")
        tab.drawn(5)
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 29)"
        assert tab.errors == []

        tab.open(tmp_path / "out" / "report.html", 390, 844)
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert tab.errors == []


def _pixels(tab: chromium.Page, at: int) -> np.ndarray:
    """Gives the canvas of a chart, [height, width, 4], 0 to 1."""
    data = tab.run(f"document.querySelector('#chart-{at} canvas').toDataURL('image/png')")
    return np.asarray(imread(io.BytesIO(base64.b64decode(data.partition(",")[2])), format="png"))


def _ink(tab: chromium.Page, at: int) -> float:
    """Gives the share of a chart's canvas that is painted."""
    return float((_pixels(tab, at)[..., 3] > 0.15).mean())
