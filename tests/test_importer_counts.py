"""Counts of other tools: profiles, with their dense layers left out and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.trace import IMPORTERS, PROFILES, import_trace, recognise
from specmd_jax.trace.profile import load_profile, save_profile

CASE = Path(__file__).parent / "data" / "cases" / "16_logical_count_dense_first_3.json"
TABLE = np.array([[0, 0, 0, 0], [3, 0, 1, 2], [0, 5, 2, 1]])


def test_dense_layers_are_named(tmp_path: Path) -> None:
    assert recognise(CASE) == "sglang-counts"
    profile = load_profile(CASE)
    assert profile.counts.tolist() == [[5, 1, 0, 2, 2, 3, 2, 1]] * 2
    assert profile.source == f"{CASE.name} (SGLang's logical_count; layers 3, 4; dense and left out: 0 to 2)"
    save_profile(profile, tmp_path / "p.npz")
    assert (load_profile(tmp_path / "p.npz").counts == profile.counts).all()


def test_matrices_of_moe_infinity(tmp_path: Path) -> None:
    path = tmp_path / "eamc.npy"
    np.save(path, np.stack([TABLE, 2 * TABLE]).astype(np.float32))
    assert recognise(path) == "moe-infinity-eamc"
    assert load_profile(path).counts.tolist() == (3 * TABLE[1:]).tolist()
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(SpecmdError, match=r"eamc\.npy: (cannot read|array .counts. holds a pickled object)"):
        load_profile(path)


def test_census_of_exllamav3(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", census=np.stack([TABLE, TABLE]), ranking=np.zeros((2, 4)))
    assert recognise(tmp_path / "p.npz") == "exllamav3"
    assert load_profile(tmp_path / "p.npz").counts.tolist() == (2 * TABLE[1:]).tolist()
    header = {"counts": {"dtype": "I64", "shape": [3, 4], "data_offsets": [0, 96]}}
    text = json.dumps(header).encode()
    path = tmp_path / "p.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + TABLE.astype(np.int64).tobytes())
    assert recognise(path) == "exllamav3" and load_profile(path).counts.tolist() == TABLE[1:].tolist()


@pytest.mark.parametrize(
    "lines",
    [
        [f"{layer},{e},{TABLE[layer, e]}" for layer in (1, 2) for e in range(4)],
        [
            "# a note",
            "layer expert count",
            *(f"{layer}\t{e}\t{TABLE[layer, e]}.0" for layer in (2, 1) for e in range(4)),
        ],
        [f"layer {layer}: [{', '.join(map(str, row))}]" for layer, row in enumerate(TABLE)],
        [f"{layer} = {' '.join(map(str, row))}" for layer, row in enumerate(TABLE)],
    ],
)
def test_text(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "counts.txt"
    path.write_text("\n".join(lines) + "\n")
    assert recognise(path) == "counts-text"
    profile = load_profile(path)
    assert profile.counts.tolist() == TABLE[1:].tolist() and "layers 1, 2" in profile.source


def test_bad_counts_are_one_line(tmp_path: Path) -> None:
    for name, content, message in (
        ("t.txt", "0 1 2\n0 1\n", "t.txt, line 2: '0 1', expected 'layer expert count' or 'layer 3: 5 0 ...'"),
        ("t.txt", "", "t.txt: no counts, expected lines"),
        ("t.txt", "0 99999 1\n", "layer 0, expert 99999, expected below 65536"),
        ("t.txt", "0 1 -5\n", "count is -5.0, expected at least 0"),
        ("t.json", '{"logical_count": [[1], [1, 2]]}', "logical_count is no table of numbers"),
        ("t.safetensors", "x", "t.safetensors: truncated"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(SpecmdError) as caught:
            load_profile(tmp_path / name)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_counts_are_no_trace() -> None:
    with pytest.raises(SpecmdError, match=r"counts \(sglang-counts\), of which no trace can be made"):
        import_trace(CASE, experts=8, expert_bytes=1)
    assert not PROFILES.keys() & IMPORTERS.keys()
