"""The benchmark of the offloaded model runs through at toy size, and keeps what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench_offload import SECTIONS, main
from experiments.benchmarks.offloading import processor
from experiments.benchmarks.offloading.host import Sides, best_split
from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model.experts import apply
from specmd_jax.moe.model.random_weights import random_experts


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


def test_what_the_engine_does_beside_one_request_at_one_precision(tmp_path: Path) -> None:
    main(["--smoke", "--only", "batches,by_cache", "--out", str(tmp_path / "bench")])
    found = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert [row["batch"] for row in found["batches"]["rows"]] == [1, 2]
    assert [row["strength"] for row in found["by_cache"]["rows"]] == [0.0, 0.1]
    assert all(row["events_equal"] for name in ("batches", "by_cache") for row in found[name]["rows"])


def test_the_host_beside_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--smoke", "--only", "host", "--out", str(tmp_path / "bench")])
    found = json.loads((tmp_path / "bench" / "bench.json").read_text())["host"]
    measured = [row for row in found["rows"] if row["what"] != "split"]
    splits = [row for row in found["rows"] if row["what"] == "split"]
    assert {row["evidence"] for row in measured} == {"measured"} and {row["evidence"] for row in splits} == {
        "estimated"
    }
    assert all(row["us"] > 0 for row in measured if row["by"] != "host between two programs")
    assert [row["missing"] for row in splits] == list(range(1, 9))
    assert all(row["us"] <= row["us_copying_all"] for row in splits)
    ways = {row["by"].split(",")[0] for row in measured if row["what"] == "an expert on the host"}
    assert {"jax bfloat16", "jax float32", "numpy float32"} <= ways
    assert "round trip of a gate" in capsys.readouterr().out


def test_every_way_to_compute_an_expert_on_the_host_is_the_models() -> None:
    cfg = moe.tiny("olmoe", "bfloat16")
    stack = jax.tree.map(np.asarray, random_experts(cfg, jax.random.key(0), 0))
    experts = [jax.tree.map(lambda leaf, n=n: leaf[n], stack) for n in range(2)]
    h = jnp.asarray(processor.token(cfg)).astype(cfg.np_dtype)
    wanted = [np.asarray(apply(cfg, jax.tree.map(jnp.asarray, one), h))[0] for one in experts]
    params = sum(leaf.size for leaf in jax.tree.leaves(experts[0]))
    for name, size, compute in processor.computes(cfg, experts):
        assert size == params * (4 if "float32" in name else 2)
        for number, row in enumerate(wanted):
            got = np.asarray(compute(number), np.float32).reshape(-1)
            np.testing.assert_allclose(got, row, atol=0.03 * np.abs(row).max())


def test_the_best_split() -> None:
    """100 us to copy one and 120 beside the host's work; 60 to compute one there and 80 beside copies; 50 there and
    back."""
    sides = Sides(100e-6, 120e-6, 60e-6, 80e-6)
    wanted = {1: (0, 100e-6), 2: (1, 130e-6), 3: (2, 210e-6), 8: (5, 450e-6)}
    for missing, (on_host, seconds) in wanted.items():
        found = best_split(missing, sides, 50e-6)
        assert found == (on_host, pytest.approx(seconds)), missing
    assert best_split(4, sides._replace(host_s=1e-3, host_beside_s=1e-3), 50e-6) == (0, pytest.approx(400e-6))


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match=r"bench\.json: no such file"):
        main(["--redraw", str(tmp_path)])


def test_a_section_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match="unknown section 'int5'") as caught:
        main(["--smoke", "--only", "int5", "--out", str(tmp_path / "bench")])
    assert all(name in str(caught.value) for name in SECTIONS.known()) and not (tmp_path / "bench").exists()
