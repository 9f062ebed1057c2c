"""Results on disk, the terminal table, the pictures and the page, on made-up rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.report import figures, style
from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.pages import capture
from specmd_jax.report.pages.sweep import pictures
from specmd_jax.report.pages.sweep.counts import read_counts, write_counts
from specmd_jax.report.pages.sweep.series import LOWER_BOUNDS, curves, near, one_cycle, settings
from specmd_jax.report.pages.sweep.summary import summary
from specmd_jax.report.pages.sweep.table import COUNTS, FIRST_KEY, TABLE
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.studies import redraw
from specmd_jax.report.terminal import aligned
from specmd_jax.report.writer import ResultWriter

ROOT = Path(__file__).parents[1]
SLOTS, CYCLE, EXPERT_BYTES = 768, 96, 13_000_000
STRENGTH = {"lru": 1.0, "lfu": 1.3, "least_stale": 1.5, "belady": 2.4, "belady_bypass": 2.8}
CONFIG = {"trace": "made-up", "evictions": list(STRENGTH)}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DPI", 40)  # a quarter of the time


def made_up_row(eviction: str, slots: int, hardware: str | None = None, **changes: int | float | str) -> Row:
    demand = 1_000_000
    share = slots / SLOTS
    missed = (1 - share) ** STRENGTH.get(eviction, 1.1) if slots >= CYCLE or eviction != "lru" else 1.0
    misses = round(demand * missed)
    collisions = 0 if eviction == "least_stale" and slots >= CYCLE else misses // 7
    seconds = None if hardware is None else 100 + misses * 1e-3
    return {
        "model": "toy",
        "eviction": eviction,
        "scope": "global",
        "contract": "event",
        "phase": "all",
        "batch": 1,
        "miss": "fetch",
        "drafts": 0,
        "acceptance": None,
        "hardware": hardware,
        "capacity_bytes": slots * EXPERT_BYTES,
        "capacity_pct": 100 * share,
        "capacity_slots": slots,
        "capacity_slots_per_layer": slots / 24,
        "cycles": slots / CYCLE,
        "demand": demand,
        "hits": demand - misses,
        "hits_reuse": demand - misses,
        "hits_prefetch": 0,
        "hits_late": 0,
        "misses": misses,
        "hit_rate": 1 - misses / demand,
        "collisions": collisions,
        "collision_rate": collisions / misses if misses else 0.0,
        "loads": misses,
        "evictions": misses,
        "bytes_demand": misses * EXPERT_BYTES,
        "bytes_prefetch_used": 0,
        "bytes_prefetch_wasted": 0,
        "ttft_s": None,
        "tpot_s": seconds and seconds / 10_000,
        "tokens_per_s": seconds and 10_000 / seconds,
        "stall_s": seconds,
        "stall_late_s": None,
        "stall_miss_s": None,
        "stall_link_busy_s": None,
        **dict.fromkeys(("dropped", "substituted", "on_host", "rerouted"), 0),
        **dict.fromkeys(("lost_mass", "mean_bits", "prefetch_precision", "prefetch_recall", "link_utilisation")),
        **dict.fromkeys(("host_s", "host_utilisation")),
        "verified": 10_000,
        "acceptance_length": 1.0,
        "loads_per_token": misses / 10_000,
        "gap_closed": 0.25,
        "tokens": 10_000,
        **{"pin_share": 0.0, "admission": "always", "admitted": None, "profile": None},
        "evidence": "simulated",
    } | changes


def made_up_rows(*hardware: str) -> list[Row]:
    sizes = (38, 76, 96, 192, 384, 576, 768)
    return [made_up_row(name, size, kind) for kind in hardware or (None,) for name in STRENGTH for size in sizes]


def write(out: Path, rows: list[Row], config: object = CONFIG, **options: bool) -> int:
    """Rows in the table afterwards."""
    with ResultWriter(out, config, TABLE, **options) as writer:  # type: ignore[arg-type]
        for row in rows:
            writer.write(row)
    return writer.rows


# ------------------------------------------------------------------------------------------------ table


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    rows = made_up_rows("rtx4090", 'a, quoted "name"')
    rows[3]["hit_rate"] = 0.1 + 0.2  # every bit of a float comes back
    rows[4]["stall_s"] = float("inf")
    write(tmp_path / "deep" / "out", rows)
    back = read_rows(tmp_path / "deep" / "out")
    assert back == rows
    assert [{k: type(v) for k, v in row.items()} for row in back] == [{k: type(v) for k, v in r.items()} for r in rows]
    assert read_rows(tmp_path / "deep" / "out" / "rows.csv", ["eviction"])[0] == {"eviction": "lru"}


def test_manifest_says_where_rows_come_from(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, CONFIG, TABLE, trace_sha256="f00d") as writer:
        writer.write(made_up_row("lru", 96))
        assert read_manifest(tmp_path)["complete"] is False
    manifest = read_manifest(tmp_path)
    assert manifest["complete"] is True
    assert manifest["rows"] == 1
    assert manifest["config"] == CONFIG
    assert manifest["trace_sha256"] == "f00d"
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["started"] <= manifest["finished"]
    assert {"python", "jax", "specmd-jax"} <= manifest["versions"].keys()


def test_unknown_column_lists_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path, [made_up_row("lru", 96)])
    with pytest.raises(SpecmdError, match=r"unknown column 'hitrate'; did you mean 'hit_rate'\? \(known: acceptance, "):
        read_rows(tmp_path, ["hitrate"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hits": 1.5}, "column hits: expected int, got float 1.5"),
        ({"batch": True}, "column batch: expected int, got bool True"),
        ({"model": "two\nlines"}, "column model: expected one line of text"),
        ({"speed": 3}, "unknown column 'speed'"),
    ],
)
def test_a_wrong_row_is_refused_whole(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with ResultWriter(tmp_path, CONFIG, TABLE) as writer:
        with pytest.raises(SpecmdError, match=message):
            writer.write(made_up_row("lru", 96, **change))
        short = made_up_row("lru", 96)
        del short["hits"]
        with pytest.raises(SpecmdError, match="a row lacks the column 'hits'"):
            writer.write(short)
    assert read_rows(tmp_path) == []


def test_an_interrupt_keeps_rows_and_the_same_config_continues(tmp_path: Path) -> None:
    rows = made_up_rows()
    with pytest.raises(KeyboardInterrupt), ResultWriter(tmp_path, CONFIG, TABLE) as writer:
        for row in rows[:9]:
            writer.write(row)
        raise KeyboardInterrupt
    assert read_rows(tmp_path) == rows[:9]
    interrupted = read_manifest(tmp_path)
    assert (interrupted["complete"], interrupted["rows"]) == (False, 9)

    with ResultWriter(tmp_path, CONFIG, TABLE) as writer:
        assert writer.has(rows[8])
        assert not writer.has(rows[9])
        assert [writer.write(row) for row in rows] == [False] * 9 + [True] * (len(rows) - 9)
    assert read_rows(tmp_path) == rows
    assert read_manifest(tmp_path)["started"] == interrupted["started"]


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_a_line_cut_off_by_a_kill_is_dropped_and_written_again(tmp_path: Path, kept: int) -> None:
    rows = made_up_rows()
    write(tmp_path, rows[:5])
    file = tmp_path / "rows.csv"
    whole = file.read_bytes()
    last = whole.rfind(b"\n", 0, -1) + 1
    file.write_bytes(whole[: last + kept] if kept > 0 else whole[:kept])
    assert read_rows(tmp_path) == rows[:4]
    assert write(tmp_path, rows) == len(rows)
    assert read_rows(tmp_path) == rows


def test_a_kill_before_the_manifest_leaves_a_usable_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    (tmp_path / ".manifest.json.12.tmp").write_text("{")
    assert write(tmp_path, made_up_rows()[:2]) == 2


def test_results_of_another_config_are_kept_unless_told(tmp_path: Path) -> None:
    rows = made_up_rows()
    write(tmp_path, rows[:5])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = CONFIG | {"evictions": ["lru"]}
    with pytest.raises(SpecmdError, match=r"another config .other evictions.: use --overwrite") as caught:
        write(tmp_path, rows[:2], other)
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecmdError, match="another config"):
        write(tmp_path, rows[:2], other, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    assert write(tmp_path, rows[2:4], other, overwrite=True) == 2
    assert read_rows(tmp_path) == rows[2:4]


def test_a_run_that_fails_at_once_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match="at once"), ResultWriter(tmp_path / "new" / "one", CONFIG, TABLE):
        raise SpecmdError("at once")
    assert not any(tmp_path.iterdir())
    write(tmp_path / "old", made_up_rows())
    with pytest.raises(SpecmdError, match="at once"), ResultWriter(tmp_path / "old", {}, TABLE, overwrite=True):
        raise SpecmdError("at once")
    assert read_rows(tmp_path / "old") == made_up_rows()


def test_a_run_that_another_one_overtook_changes_nothing(tmp_path: Path) -> None:
    rows = made_up_rows()
    with pytest.raises(SpecmdError, match="another config"), ResultWriter(tmp_path, CONFIG, TABLE) as late:
        write(tmp_path, rows[:3], {"trace": "other"})
        late.write(rows[5])
    assert read_rows(tmp_path) == rows[:3]
    assert read_manifest(tmp_path)["complete"] is True
    with ResultWriter(tmp_path / "same", CONFIG, TABLE) as late:
        write(tmp_path / "same", rows[:3])
        assert [late.write(row) for row in rows[:4]] == [False, False, False, True]
    assert read_rows(tmp_path / "same") == rows[:4]


def test_results_of_other_code_are_continued_only_with_resume(tmp_path: Path) -> None:
    rows = made_up_rows()
    write(tmp_path, rows[:2])
    manifest = read_manifest(tmp_path)
    manifest["versions"]["specmd-jax"] = "0.0.1"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SpecmdError, match=r"made by other code .version 0.0.1.*--overwrite.*--resume"):
        write(tmp_path, rows)
    assert write(tmp_path, rows, resume=True) == len(rows)


def test_a_folder_with_other_things_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SpecmdError, match=r"is not empty and holds no manifest.json"):
        write(tmp_path, [], overwrite=True)
    with pytest.raises(SpecmdError, match="expected a folder for the results, found a file"):
        write(tmp_path / "thesis.tex", [])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX")
def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, CONFIG, TABLE) as writer:
        writer.write(made_up_row("lru", 96))
        with pytest.raises(SpecmdError, match="another run is writing here"):
            write(tmp_path, [], overwrite=True)
    assert len(read_rows(tmp_path)) == 1


def test_damage_inside_a_table_is_named(tmp_path: Path) -> None:
    write(tmp_path, made_up_rows()[:3])
    file = tmp_path / "rows.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], lines[2].replace(",1,", ",one,", 1), *lines[3:]]))
    with pytest.raises(SpecmdError, match=r"rows.csv, line 3, column batch: expected int, got 'one'"):
        read_rows(tmp_path)
    file.write_text("".join([*lines[:3], "toy,lru\n"]))
    with pytest.raises(SpecmdError, match=rf"rows.csv, line 4: 2 cells, expected {len(TABLE.columns)}"):
        read_rows(tmp_path)
    with pytest.raises(SpecmdError, match="no results here"):
        read_rows(tmp_path / "elsewhere")


def test_counts_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    write_counts(path, [[1, 2, 3], [4, 5, 6]])
    assert read_counts(path) == [[1, 2, 3], [4, 5, 6]]
    path.write_text("1,2\n3\n")
    with pytest.raises(SpecmdError, match="line 2: 1 counts, expected 2"):
        read_counts(path)


# ------------------------------------------------------------------------------------------------ series, text


def test_capacities_near_a_wish_and_one_cycle() -> None:
    rows = made_up_rows()
    assert one_cycle(rows) == pytest.approx(12.5)
    assert [size / EXPERT_BYTES for size in near(rows, [5, 25, 60])] == [38, 96, 192]  # nothing lies near 60 %
    assert len(near([row for row in rows if row["capacity_slots"] in (384, 576)], [5])) == 2


def test_a_curve_takes_one_hardware_and_rises_in_capacity() -> None:
    lines = curves(reversed(made_up_rows("slow", "fast")), "slow")
    assert [row["capacity_slots"] for row in lines["lfu"]] == [38, 76, 96, 192, 384, 576, 768]
    assert {row["hardware"] for cells in lines.values() for row in cells} == {"slow"}
    assert [len(cells) for cells in curves(made_up_rows("slow", "fast")).values()] == [7] * 5


def test_summary_is_sorted_aligned_and_warns_below_one_cycle() -> None:
    shown = summary(made_up_rows())
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0] == "toy, 10,000 tokens, scope global, contract event, simulated"
    assert shown.count("C/T < 1") == 2  # 38 and 76 slots
    start = lines.index("capacity 25 % of the experts = 192 slots (8 a layer) = 2,380 MiB = 2.00 C/T")
    head, rule, *body = lines[start + 1 : start + 8]
    assert set(rule) == {"-"}
    assert [line.split()[0] for line in body] == ["belady_bypass", "belady", "least_stale", "lfu", "lru"]
    assert len({len(line) for line in (head, rule, *body)}) == 1  # numbers end where their heading ends
    assert body[-1].split() == ["lru", "25.00", "750,000", "107,142", "9,080", "929.8", "25.0"]


def test_summary_leaves_out_hardware_that_does_not_fit_and_says_so() -> None:
    shown = summary(made_up_rows("rtx4090", "a-machine-with-quite-a-long-name", "another-one"), width=110)
    assert "tok/s rtx4090" in shown
    assert "no room for tok/s a-machine-with-quite-a-long-name, tok/s another-one: see rows.csv" in shown
    assert max(map(len, shown.splitlines())) <= 110


def test_settings_do_not_mix() -> None:
    rows = [*made_up_rows(), *(made_up_row("lru", size, scope="layer") for size in (96, 192))]
    assert [len(group) for group in settings(rows).values()] == [35, 2]
    for show in (summary, pictures.hit_rate):
        with pytest.raises(SpecmdError, match="expected rows of one setting, got 2"):
            show(rows)


# ------------------------------------------------------------------------------------------------ pictures


def test_every_policy_has_a_look_of_its_own() -> None:
    from specmd_jax.policies.eviction import EVICTION

    names = [*EVICTION, "lfu_decay(0.8)", "of my own"]
    found = style.looks(names)
    assert len({(look.color, str(look.linestyle), look.marker) for look in found.values()}) == len(names)
    assert {name for name in EVICTION if found[name].linewidth > 2} == set(style.EMPHASISED)  # thick
    assert found["lfu_decay(0.8)"].color == found["lfu_decay"].color != found["lfu"].color
    assert style.looks(["lru"])["lru"] == found["lru"]  # whatever else is drawn
    assert {name for name, make in EVICTION.items() if make().oracle} == set(LOWER_BOUNDS)


def test_pictures_show_every_policy_and_say_what_they_show() -> None:
    rows = made_up_rows("rtx4090", "phone")
    for figure, panels in ((pictures.hit_rate(rows), 1), (pictures.collisions(rows), 2), (pictures.speed(rows), 2)):
        legend = {entry.get_text() for entry in figure.legends[0].get_texts()}
        assert STRENGTH.keys() <= legend
        assert "one token cycle (C/T = 1)" in legend
        assert "toy, 10,000 tokens, scope global, contract event, simulated" in figure.get_suptitle()
        assert len(figure.axes) == panels
    axes = pictures.hit_rate(rows).axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(np.asarray(drawn["belady"].get_ydata())[-1], 100)
    np.testing.assert_allclose(np.asarray(drawn["one token cycle (C/T = 1)"].get_xdata()), 12.5)
    assert len(axes.collections) == 2  # the bounds' band and the room below them
    zeros = pictures.collisions(rows).axes[0]
    assert zeros.transData.transform((0, 0))[1] >= zeros.bbox.y0  # zero is on the scale


@pytest.mark.parametrize("evictions", [["lru"], ["belady", "belady_bypass"]])
def test_pictures_of_a_few_policies_or_one_capacity(evictions: list[str], tmp_path: Path) -> None:
    rows = [made_up_row(name, 192) for name in evictions]
    for figure in (pictures.hit_rate(rows), pictures.collisions(rows)):
        assert figures.save(figure, tmp_path, "one").stat().st_size > 3_000


def test_report_is_redrawn_from_the_folder_without_jax(tmp_path: Path) -> None:
    write(tmp_path, made_up_rows("rtx4090"))
    write_counts(tmp_path / COUNTS, [[5, 1], [2, 4]])
    script = (
        "import sys, runpy; sys.argv = ['report', sys.argv[1]];"
        "runpy.run_module('experiments.report', run_name='__main__'); assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["hit_rate", "collisions", "speed"]
    drawn = [*(f"figures/{name}.png" for name in names), "report.md", "report.html", "rows.csv"]
    assert done.stdout.splitlines()[-6:] == [str(tmp_path / name) for name in drawn]
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="chart"') == 6  # that of the routing counts, too
    assert "least_stale" in page
    assert "did not finish" not in page


def test_drawing_an_unfinished_or_mixed_table(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ResultWriter(tmp_path, CONFIG, TABLE) as writer:
        for scope in ("global", "layer"):
            writer.write(made_up_row("lru", 192, scope=scope, model="<toy>"))
        raise RuntimeError
    assert "! The run that made this table did not finish" in redraw(tmp_path)
    paths = [*(tmp_path / "figures").iterdir(), tmp_path / "report.md", tmp_path / "report.html"]
    assert len(paths) == 2 * 2 + 2
    page = paths[-1].read_text()
    assert "did not finish" in page
    assert "&lt;toy&gt;" in page
    write(tmp_path, [], overwrite=True)
    assert not any(path.exists() for path in paths)  # pictures of rows that are gone
    with pytest.raises(SpecmdError, match="no rows yet"):
        redraw(tmp_path)


def test_a_sweep_without_its_name_is_told_by_its_columns_and_others_are_refused(tmp_path: Path) -> None:
    drafted = {"drafts", "acceptance", "verified", "acceptance_length", "loads_per_token"}  # columns that it lacks
    before = {name: column for name, column in TABLE.columns.items() if name not in drafted}
    with ResultWriter(tmp_path / "old", CONFIG, Table("sweep", before, FIRST_KEY)) as writer:
        for row in made_up_rows():
            writer.write({name: row[name] for name in before})
    plain = Table("my_study", {"a": Column("int", "a number")}, ("a",))
    with ResultWriter(tmp_path / "mine", {}, plain) as writer:
        writer.write({"a": 1})
    with pytest.raises(SpecmdError, match=r"mine: my_study draws nothing \(expected results of sweep, "):
        redraw(tmp_path / "mine")
    for folder in ("old", "mine"):
        path = tmp_path / folder / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["study"]
        path.write_text(json.dumps(manifest))
    assert "belady *" in redraw(tmp_path / "old")
    with pytest.raises(SpecmdError, match="mine: its manifest does not say which study made it"):
        redraw(tmp_path / "mine")
    with pytest.raises(SpecmdError, match="no results here"):
        redraw(tmp_path / "nothing")


def test_timings_of_a_capture_are_told_again(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, {"timed_tokens": 8}, capture.TABLE) as writer:
        for repeat, pair in enumerate(((0.010, 0.011), (0.020, 0.021), (0.030, 0.029))):
            for hooks, tpot_s in zip((False, True), pair, strict=True):
                writer.write({"repeat": repeat, "hooks": hooks, "tpot_s": tpot_s, "evidence": "measured"})
    assert redraw(tmp_path).splitlines() == [
        "TPOT alone    20.000 ms (10.000 to 30.000)",
        "TPOT hooked   21.000 ms (11.000 to 29.000)",
        "overhead      +5.00 % of the medians (-3.33 to +10.00 % pair by pair; not to be told from noise), measured: "
        "3 pairs of 8 tokens",
    ]


def test_a_table_from_before_a_column_is_refused_in_one_line(tmp_path: Path) -> None:
    columns = {name: column for name, column in capture.TABLE.columns.items() if name != "hooks"}
    with ResultWriter(tmp_path, {"timed_tokens": 8}, Table("capture", columns, ("repeat",))) as writer:
        writer.write({"repeat": 0, "tpot_s": 0.01, "evidence": "measured"})
    with pytest.raises(SpecmdError, match=r"has no column 'hooks': an older version of capture wrote it$"):
        redraw(tmp_path)


def test_figures_stand_to_the_right_and_words_to_the_left() -> None:
    rows = [("lru", "9.5", "-3 %", "5.0 (4.0..6.0)", "as 1"), ("belady *", "1,234", "", "-", "2 bits")]
    assert aligned(("policy", "n", "change", "gap", "why"), rows) == [
        "policy        n  change             gap  why",
        "-" * 47,
        "lru         9.5    -3 %  5.0 (4.0..6.0)  as 1",
        "belady *  1,234                       -  2 bits",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named_and_the_rows_go_on(tmp_path: Path) -> None:
    table = Table("toy", {"a": Column("int", "a number")}, ("a",))
    full = pytest.raises(SpecmdError, match=r"rows\.csv: cannot write: No space left on device$")
    with full, ResultWriter(tmp_path / "out", {}, table) as writer:
        writer.write({"a": 1})
        writer._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115  closed by the writer
        writer.write({"a": 2})
    with ResultWriter(tmp_path / "out", {}, table) as writer:
        assert writer.has({"a": 1}) and writer.write({"a": 2})
    assert read_rows(tmp_path / "out") == [{"a": 1}, {"a": 2}]
