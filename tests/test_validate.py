"""Published measurements: the table, predictions by hand, fits of known constants, and bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.studies.validate import rows_of
from experiments.validate import main
from experiments.validation.cells import CELLS, Cell, published_cells
from experiments.validation.fitting import Profile, Terms, fitted, held_out, seconds, terms_of
from experiments.validation.prediction import Work, machine_of, token_seconds, work_of
from specmd_jax.errors import SpecmdError
from specmd_jax.report.reader import read_rows
from specmd_jax.specs.engines import ENGINES
from specmd_jax.specs.hardware import Hardware
from specmd_jax.specs.models import model

# seconds by hand: a copy takes 10, an expert on the device 1, on the host 4 (and 3 for the hand-over), a layer 1
MACHINE = Hardware(
    link_bytes_per_s=1.0, link_latency_s=0.0, peak_flops_per_s=math.inf, memory_bytes_per_s=math.inf, launch_s=0.0,
    host_flops_per_s=math.inf, host_bytes_per_s=1e9, host_moe_bytes_per_s=2.5, handover_s=3.0, layer_s=1.0,
)  # fmt: skip
WORK = Work(
    layers=3, top_k=2, missing=0.5, miss="fetch", expert_bytes=10, expert_s=1.0, dense_s=2.0, head_s=5.0,
)  # fmt: skip


def _cell(name: str) -> Cell:
    return next(cell for cell in published_cells() if cell.id == name)


def test_the_table_has_enough_and_says_where_it_is_from() -> None:
    cells = published_cells()
    told = [cell for cell in cells if not cell.reason]
    assert len(told) >= 40 and len({cell.engine for cell in told}) >= 5
    for cell in cells:
        assert cell.source.startswith("https://"), cell.id
        assert 0.1 < cell.tokens_per_s < 1000, cell.id
        assert cell.reason or 0 <= work_of(cell, machine_of(cell)).missing <= 1, cell.id


@pytest.mark.parametrize(
    ("miss", "overlaps", "visit_s"),
    [
        ("fetch", 1.0, (2 + 2 * 11 + 21) / 4),  # 0, 1 or 2 misses with chances 1, 2, 1 in 4
        ("fetch", 0.0, (2 + 2 * 12 + 22) / 4),
        ("cpu", 1.0, (2 + 2 * 7 + 11) / 4),
        ("cpu", 0.0, (2 + 2 * 8 + 11) / 4),
        ("split", 1.0, (2 + 2 * 7 + 11) / 4),  # two on the host take 11, one there and a copy beside it 11, too
    ],
)
def test_a_token_by_hand(miss: str, overlaps: float, visit_s: float) -> None:
    found = token_seconds(WORK._replace(miss=miss), MACHINE.replace(overlaps=overlaps))
    assert found == pytest.approx(3 * (visit_s + 2 + 1) + 5)


def test_copies_and_host_share_its_memory() -> None:
    """One expert on each: the link draws 1 byte a second and the host 2.5 of 2.5, so the 4 s together take 1.4 x."""
    machine = MACHINE.replace(host_bytes_per_s=2.5, handover_s=30.0)
    work = WORK._replace(miss="split", missing=1.0)
    assert token_seconds(work, machine.replace(handover_s=3.0)) == pytest.approx(3 * (11 + 3) + 5)  # both on the host
    assert token_seconds(work, machine) == pytest.approx(3 * (21 + 3) + 5)  # both copied
    slow = machine.replace(handover_s=0.0, host_moe_bytes_per_s=0.8)  # 12.5 s each: 1 + 0.8 is less than 2.5
    assert token_seconds(work, slow) == pytest.approx(3 * (12.5 + 3) + 5)


def test_two_cells_by_hand() -> None:
    resident, spec = _cell("R-qwen3-resident"), model("Qwen3-30B-A3B")
    machine = machine_of(resident)
    by_hand = 48 * ((8 * 3 * 2048 * 768 * 2 + spec.dense_bytes) / 1604e9 + 42e-6) + spec.head_bytes / 1604e9
    assert token_seconds(work_of(resident, machine), machine) == pytest.approx(by_hand)

    cell, spec = _cell("MSL-aa-Pi-gpt-o-11%"), model("gpt-oss-120b")  # a copy takes far longer than four experts
    machine, expert = machine_of(cell), 13_236_480 / 1692e9
    none = (1 - 58.37 / (36 * 4)) ** 4
    by_hand = 58.37 * (10e-6 + 13_236_480 / 19e9) + 36 * (expert * (1 - none + 4 * none) + 42e-6)
    by_hand += (36 * spec.dense_bytes + spec.head_bytes) / 1692e9
    assert token_seconds(work_of(cell, machine), machine) == pytest.approx(by_hand)


def test_fits_find_the_constants_and_never_go_below_zero() -> None:
    true = Profile(1e-4, 0.5)
    machine = MACHINE.replace(layer_s=7.0)
    base = terms_of(WORK, machine, 1.0)
    assert base[:3] == pytest.approx((3 * (2 + 2) + 5, 3, 3 * 10))  # the machine's own layer_s is left out
    cells = [Terms(0.01 * n, 40, 0.002 * n * n, 0.0) for n in range(1, 5)]
    cells = [cell._replace(measured_s=seconds(cell, true)) for cell in cells]
    assert fitted(cells) == pytest.approx(true)
    assert held_out(cells, range(4)) == pytest.approx([cell.measured_s for cell in cells])
    faster = [cell._replace(measured_s=0.5 * cell.base_s) for cell in cells]
    assert fitted(faster) == (0.0, math.inf)


def test_the_same_on_other_machines_is_held_out_too() -> None:
    cells = [Terms(0.0, 1, 1.0, 2.0), Terms(0.0, 1, 3.0, 4.0), Terms(0.0, 1, 1.0, 90.0), Terms(0.0, 1, 1.0, 80.0)]
    found = held_out(cells, ["a", "b", "c", "c"])
    assert found[2:] == pytest.approx([2.0, 2.0])  # 1 + 1 from the first two, which differ only in their misses


def test_held_out_cells_do_not_see_themselves() -> None:
    cells = [cell for cell in published_cells() if cell.engine == "streamlx"]
    wrong = [*cells[:-1], Cell(**{**vars(cells[-1]), "tokens_per_s": 99.0})]
    before, after = ([row["held_out_tokens_per_s"] for row in rows_of(some)] for some in (cells, wrong))
    assert before[-1] == after[-1] and before[0] != after[0]


def test_the_page_and_its_headline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "here")])
    shown = capsys.readouterr().out
    rows = read_rows(tmp_path / "here")
    assert len(rows) == len(published_cells())
    held = np.abs([float(row["held_out_error"]) for row in rows if row["held_out_error"] is not None])
    assert np.median(held) <= 0.1 and (held <= 0.2).mean() >= 0.8
    assert f"median error {100 * np.median(held):.1f} % over {len(held)} cells" in shown
    assert (tmp_path / "here" / "figures" / "validate.png").stat().st_size


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id,engine", "name,engine", "expected the columns id, engine"),
        (",49.91,", ",fast,", "line 2: tokens_per_s is 'fast', expected float"),
        (",49.91,0.595,", ",49.91,1.595,", "line 2: hit_rate is 1.595, expected 0 to 1"),
        (",fetch,copies,", ",fetch,guesses,", "line 2: misses_from is 'guesses'"),
        (",fetch,copies,", ",fetch,,", "expected either misses_from or the reason"),
        ("MSL-aa-Pb-", "MSL-aa-Pa-", "two cells have the same id"),
    ],
)
def test_a_bad_table(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "cells.csv"
    path.write_text(CELLS.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SpecmdError) as caught:
        published_cells(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_engine(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match=r"unknown engine 'imb'; did you mean 'imp'\?"):
        main(["--engines", "imb", "--out", str(tmp_path)])


def test_engine_profiles_are_the_fits() -> None:
    """Each stands for what the table gives, predicts held-out cells within 10 %, and is no faster than the link."""
    rows: list[Any] = [row for row in rows_of(published_cells()) if row["layer_s"] is not None]
    good = {}
    for engine in {row["engine"] for row in rows}:
        mine = [row for row in rows if row["engine"] == engine]
        error = float(np.median([abs(row["held_out_error"]) for row in mine]))
        if error <= 0.1 and mine[0]["rate_share"] <= 1.01 and all(row["miss"] == "fetch" for row in mine):
            good[engine] = (mine[0]["layer_s"], min(1.0, mine[0]["rate_share"]))
    named = {name: (found.layer_s, found.link_share) for name, found in ENGINES.items() if found.layer_s is not None}
    assert good.keys() == named.keys()
    for name, found in good.items():
        assert named[name] == pytest.approx(found, rel=5e-3), name
