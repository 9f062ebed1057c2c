"""The benchmark of the offloaded model runs through at toy size, and keeps what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bench_offload import SECTIONS, main
from specmd_jax.errors import SpecmdError


def test_the_fused_engines_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--smoke", "--only", "bfloat16", "--out", str(tmp_path / "bench")])
    found = json.loads((tmp_path / "bench" / "bench.json").read_text())["bfloat16"]
    assert found["tokens_equal_25%"] and found["logits_equal_25%"]
    assert len(found["rows"]) == 3 and all(row["events_equal"] for row in found["rows"])
    shown = capsys.readouterr().out
    assert "tpot_over_memory" in shown and "predicted_tpot_s" in shown
    picture = tmp_path / "bench" / "figures" / "offload_bfloat16.png"
    before = picture.read_bytes()
    picture.unlink()
    main(["--redraw", str(tmp_path / "bench")])
    assert picture.read_bytes() == before and str(picture) in shown and str(picture) in capsys.readouterr().out


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match=r"bench\.json: cannot be read as results"):
        main(["--redraw", str(tmp_path)])


def test_a_section_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match="unknown section 'int5'") as caught:
        main(["--smoke", "--only", "int5", "--out", str(tmp_path / "bench")])
    assert all(name in str(caught.value) for name in SECTIONS) and not (tmp_path / "bench").exists()
