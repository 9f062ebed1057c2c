"""Foreign traces: what is read, and how a bad file is named."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.trace import IMPORTERS, bundled, import_trace, load_trace, read_bigmoe, sha256

DATA = Path(__file__).parent / "data"

# ------------------------------------------------------------------------------------------------- bigmoe-csv

PREAMBLE = """\
# route_trace v1
# model=/data/my models/Tiny-Q4.gguf arch=tiny n_layer=3 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=70
# layer=1 expert_bytes=100 dense_bytes=71
# layer=2 expert_bytes=120 dense_bytes=72
"""
HEADER = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
ROWS = [
    # a prompt of two tokens, layer by layer as the engine runs it; the last layer only for the last token
    "0,0,0,1,0,3,0.75,0,100",
    "0,0,0,1,1,5,0.25,0,100",
    "0,0,1,1,0,5,0.5,0,0",
    "0,0,1,1,1,3,0.5,0,0",
    "0,0,1,2,0,7,0.625,0,120",
    "0,0,1,2,1,0,0.375,0,120",
    "0,1,2,1,0,3,1,1,0",
    "0,1,2,1,1,6,0,0,100",
    "0,1,2,2,0,1,0.5,0,120",
    "0,1,2,2,1,7,0.5,2,0",
    # a second turn goes on in the same context, after two positions that were never run
    "1,0,5,1,0,2,0.5,0,100",
    "1,0,5,1,1,4,0.5,0,100",
    "1,1,6,2,0,6,0.5,0,120",
    "1,1,6,2,1,5,0.5,0,120",
]


def csv(tmp_path: Path, rows: list[str] = ROWS, preamble: str = PREAMBLE, header: str = HEADER) -> Path:
    path = tmp_path / "t.csv"
    path.write_text(preamble + "\n".join([header, *rows]) + "\n")
    return path


def test_bigmoe(tmp_path: Path) -> None:
    trace, residency = read_bigmoe(csv(tmp_path))
    none = [-1, -1]
    ids = [[[3, 5], none], [[5, 3], [7, 0]], [[3, 6], [1, 7]], [[2, 4], none], [none, [6, 5]]]
    assert trace.expert_ids.tolist() == ids
    assert residency.dtype == np.int8
    assert residency.tolist() == [[[0, 0], none], [[0, 0]] * 2, [[1, 0], [0, 2]], [[0, 0], none], [none, [0, 0]]]
    assert trace.gates is not None
    assert trace.gates[:3].tolist() == [
        [[0.75, 0.25], [0, 0]],
        [[0.5, 0.5], [0.625, 0.375]],
        [[1, 0], [0.5, 0.5]],
    ]
    assert trace.lengths.tolist() == [3, 2] and trace.prompt_lengths.tolist() == [2, 1]
    assert trace.experts == 8 and trace.expert_bytes.tolist() == [100, 120]
    assert trace.model == "Tiny-Q4" and trace.meta["arch"] == "tiny"
    assert trace.meta["dense_bytes"] == [71, 72] and trace.meta["layer_numbers"] == [1, 2]
    assert trace.meta["requests"] == [{"turn": 0}, {"turn": 1}]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_bigmoe_packed(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    plain = csv(tmp_path)
    packed = tmp_path / f"t.csv{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))
    np.testing.assert_array_equal(import_trace(packed, "bigmoe-csv").expert_ids, read_bigmoe(plain)[0].expert_ids)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(SpecmdError, match=rf"t\.csv\{suffix}: cannot read"):
        read_bigmoe(packed)


def test_bigmoe_row_and_column_order_do_not_matter(tmp_path: Path) -> None:
    trace, residency = read_bigmoe(csv(tmp_path))
    names = HEADER.split(",")
    shuffled = [",".join(["0" if i % 5 else "1", *reversed(row.split(","))]) for i, row in enumerate(reversed(ROWS))]
    other, same = read_bigmoe(csv(tmp_path, shuffled, header=",".join(["dropped", *reversed(names)])))
    np.testing.assert_array_equal(other.expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(other.gates, trace.gates)
    np.testing.assert_array_equal(same, residency)
    assert other.meta["dropped"] == 3 and "dropped" not in trace.meta


def test_bigmoe_without_weights(tmp_path: Path) -> None:
    rows = [",".join([*row.split(",")[:6], "nan", *row.split(",")[7:]]) for row in ROWS]
    assert read_bigmoe(csv(tmp_path, rows))[0].gates is None
    with pytest.raises(SpecmdError, match=r"t\.csv, line 7: weight is nan, expected a finite number"):
        read_bigmoe(csv(tmp_path, [rows[0], *ROWS[1:]]))


def changed(row: int, **fields: str) -> list[str]:
    values = dict(zip(HEADER.split(","), ROWS[row].split(","), strict=True)) | fields
    return [*ROWS[:row], ",".join(values.values()), *ROWS[row + 1 :]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(3, expert="8"), "line 10: expert is 8, expected an integer from 0 to 7"),
        (changed(3, expert="1.5"), "line 10: expert is 1.5, expected an integer from 0 to 7"),
        (changed(3, expert="x"), "line 10: expert is 'x', expected a number"),
        (changed(3, expert="5"), "request 0, token 1, layer 0: expert 5 appears twice"),
        (changed(0, slot="2"), "line 7: slot is 2, expected an integer from 0 to 1"),
        (changed(1, slot="0"), "line 8: slot is 0, expected one row a turn, step, layer and slot"),
        (changed(0, layer="0"), "line 7: layer is 0, expected a layer whose expert_bytes in the preamble is above 0"),
        (changed(0, layer="3"), "line 7: layer is 3, expected an integer from 0 to 2"),
        (changed(0, residency="3"), "line 7: residency is 3, expected an integer from 0 to 2"),
        (changed(2, phase="1"), "line 10: phase is 0, expected the phase of the other rows of its turn and step"),
        (changed(0, phase="2"), "line 7: phase is 2, expected an integer from 0 to 1"),
        (changed(1, weight="-1"), "line 8: weight is -1, expected a finite number >= 0"),
        (changed(0, turn="-1"), "line 7: turn is -1"),
        (
            [*ROWS[:4], *(row.replace("0,1,2,", "0,1,3,") for row in ROWS[6:10])],
            "line 11: step is 3 in turn 0, expected 2",
        ),
        ([*ROWS, "1,0,7,1,0,2,0.5,0,100"], "line 21: prefill step 7 of turn 1 comes after a decode step"),
        ([*ROWS[:2], ROWS[2] + ",0"], "line 9: 10 fields, expected 9"),
        ([*ROWS[:2], "", ROWS[2]], "line 9: 1 fields, expected 9"),
        ([], "no rows after the header"),
    ],
)
def test_bad_bigmoe_rows(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        read_bigmoe(csv(tmp_path, rows))
    assert message in str(caught.value) and "t.csv" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("route_trace v1", "route_trace v2", "t.csv, line 1: expected '# route_trace v1'"),
        (" n_expert_used=2", "", "t.csv, line 2: n_expert_used= is missing"),
        ("n_expert=8", "n_expert=eight", "t.csv, line 2: invalid literal"),
        ("n_expert=8", "n_expert=0", "n_expert is 0 in the preamble, expected 1 to 65535"),
        ("# layer=1 expert_bytes=100 dense_bytes=71\n", "", "has no line for layer 1, expected 0 to 2"),
        ("n_layer=3", "n_layer=2", "the preamble has layer 2, expected 0 to 1"),
        ("expert_bytes=100", "expert_bytes=-100", "expected >= 0, and > 0 in a layer"),
        (" dense_bytes=72", "", "t.csv, line 5: dense_bytes= is missing"),
        ("residency", "resident", "t.csv, line 6: column 'residency' is missing"),
    ],
)
def test_bad_bigmoe_heads(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = csv(tmp_path).read_text().replace(old, new)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(SpecmdError) as caught:
        read_bigmoe(tmp_path / "t.csv")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bigmoe_without_a_model_name(tmp_path: Path) -> None:
    path = csv(tmp_path, preamble=PREAMBLE.replace("model=/data/my models/Tiny-Q4.gguf arch=tiny ", ""))
    assert read_bigmoe(path)[0].model == "unknown"


@pytest.mark.parametrize(("name", "file"), [("bigmoe-qwen3-30b-a3b", "qwen"), ("bigmoe-gpt-oss-120b", "gptoss")])
def test_the_bundled_residency_fits_its_trace(name: str, file: str) -> None:
    with np.load(DATA / f"{file}-residency.npz", allow_pickle=False) as arrays:
        residency = arrays["residency"]
    trace = bundled(name)
    np.testing.assert_array_equal(residency < 0, trace.expert_ids < 0)
    absent = (trace.expert_ids < 0).any(axis=-1)
    last_prompt = int(trace.prompt_lengths[0]) - 1
    assert np.argwhere(absent).tolist() == [[token, trace.layers - 1] for token in range(last_prompt)]


# ---------------------------------------------------------------------------------------- gpt-oss-fingerprint


def routing(start: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    probs = [0.5, 0.25, 0.125, 0.125]
    return [
        {
            f"token_{start + t}": {
                f"layer_{layer}": {"selected_experts": rng.permutation(32)[:4].tolist(), "selected_probs": probs}
                for layer in range(24)
            }
        }
        for t in range(tokens)
    ]


def example(seed: int = 0, start: int = 103, tokens: int = 3, **rest: Any) -> dict[str, Any]:
    head = {"dataset": "mmlu_dev", "category": "anatomy", "finished_successfully": True, "has_repetition": False}
    return head | {"original_prompt": "?", "router_data": routing(start, tokens, seed)} | rest


def test_fingerprint_file(tmp_path: Path) -> None:
    path = tmp_path / "True_False_examples.json"
    one = example()
    path.write_text(json.dumps(one))
    trace = import_trace(path, "gpt-oss-fingerprint")
    assert (trace.requests, trace.tokens, trace.layers, trace.experts, trace.top_k) == (1, 3, 24, 32, 4)
    cells = [
        [one["router_data"][t][f"token_{103 + t}"][f"layer_{layer}"]["selected_experts"] for layer in range(24)]
        for t in range(3)
    ]
    assert trace.expert_ids.tolist() == cells
    assert trace.gates is not None and trace.gates[2, 23].tolist() == [0.5, 0.25, 0.125, 0.125]
    assert trace.prompt_lengths.tolist() == [0] and trace.model == "gpt-oss-20b"
    row = {"dataset": "mmlu_dev", "category": "anatomy", "prompt_tokens": 103, "finished": True}
    assert trace.meta["requests"] == [row]
    bits = 3 * 2880 * 2880 * 4 + 3 * 2880 * 2880 // 32 * 8 + (5760 + 2880) * 16
    assert trace.expert_bytes.tolist() == [bits // 8] * 24 and str(bits // 8) in trace.meta["capture"]


def test_fingerprint_folder_lists_and_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    backwards = example(3, tokens=2)
    backwards["router_data"].reverse()
    (tmp_path / "b" / "x_examples.json").write_text(json.dumps([example(1), backwards]))
    (tmp_path / "a" / "y_examples.json").write_text(json.dumps({"examples": [example(2, has_repetition=True)]}))
    (tmp_path / "a" / "y.json").write_text("not read")
    trace = import_trace(tmp_path, "gpt-oss-fingerprint")
    assert trace.lengths.tolist() == [3, 3, 2]
    assert [row.get("repetitive") for row in trace.meta["requests"]] == [True, None, None]
    cell = backwards["router_data"][1]["token_103"]["layer_5"]["selected_experts"]
    assert trace.expert_ids[6, 5].tolist() == cell  # tokens are put in order of their position


def packed(tmp_path: Path, **changes: Any) -> Path:
    ids = np.array(
        [
            [next(iter(token.values()))[f"layer_{i}"]["selected_experts"] for i in range(24)]
            for token in routing(0, 5, 0)
        ]
    )
    arrays = {
        "expert_ids": ids.astype(np.uint8),
        "gate_u8": np.full((5, 24, 4), 64, np.uint8),
        "lengths": np.array([2, 3], np.int32),
        "meta": np.array(json.dumps([{"dataset": "a"}, {"dataset": "b"}])),
    } | changes
    np.savez(tmp_path / "t.npz", **{name: array for name, array in arrays.items() if array is not None})
    return tmp_path / "t.npz"


def test_fingerprint_npz(tmp_path: Path) -> None:
    trace = import_trace(packed(tmp_path), "gpt-oss-fingerprint")
    assert trace.lengths.tolist() == [2, 3] and trace.meta["requests"] == [{"dataset": "a"}, {"dataset": "b"}]
    assert trace.gates is not None and trace.gates[0, 0, 0] == np.float32(64) / np.float32(255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_u8": None}, "array 'gate_u8' is missing"),
        ({"expert_ids": np.zeros((5, 23, 4), np.uint8)}, "expert_ids has shape [5, 23, 4], expected [tokens, 24, 4]"),
        ({"gate_u8": np.zeros((5, 24, 4))}, "gate_u8 has dtype float64, expected uint8"),
        ({"gate_u8": np.zeros((5, 24, 3), np.uint8)}, "gates has shape [5, 24, 3], expected [5, 24, 4]"),
        ({"lengths": np.array([2.0])}, "lengths is float64, expected a list of integers"),
        ({"lengths": np.array([2, 2])}, "lengths sum to 4, expected 5"),
        ({"meta": np.array("[{}]")}, "meta key 'requests' has 1 rows"),
        ({"meta": np.array("[")}, "cannot read"),
        ({"meta": np.array({}, dtype=object)}, "cannot read"),
        ({"expert_ids": np.full((5, 24, 4), 32, np.uint8)}, "request 0, token 0, layer 0: expert id is 32"),
    ],
)
def test_bad_fingerprint_npz(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        import_trace(packed(tmp_path, **changes), "gpt-oss-fingerprint")
    assert message in str(caught.value) and "t.npz" in str(caught.value) and "\n" not in str(caught.value)


def edited(**cell: Any) -> dict[str, Any]:
    """An example whose token 104 has another layer 7; a value of ... takes the key away."""
    one = example()
    target = one["router_data"][1]["token_104"]["layer_7"]
    target |= cell
    for key in [key for key, value in target.items() if value is ...]:
        del target[key]
    return one


def with_tokens(edit: Callable[[list[dict[str, Any]]], Any]) -> dict[str, Any]:
    one = example()
    edit(one["router_data"])
    return one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,\n "b": }', "x_examples.json, line 2: Expecting value, expected JSON"),
        ({"a": [1, 2]}, "x_examples.json: no object with 'router_data' in it"),
        (example(router_data=[]), "x_examples.json: router_data is [], expected a list of tokens"),
        (example(router_data=[3]), "x_examples.json, router_data 0: 3, expected"),
        (
            [example(), edited(selected_experts=[1, 2, 3])],
            "example 1, token_104, layer_7: selected_experts is [1, 2, 3]",
        ),
        (
            edited(selected_experts=[1, 2, 3, 32]),
            "token_104, layer_7: selected_experts is [1, 2, 3, 32], expected 4 of 0",
        ),
        (edited(selected_experts=[1, 2, 3, True]), "token_104, layer_7: selected_experts is [1, 2, 3, True]"),
        (edited(selected_experts=[1, 2, 3, 3]), "request 0, token 1, layer 7: expert 3 appears twice"),
        (edited(selected_experts=...), "token_104, layer_7: {'selected_probs'"),
        (edited(selected_probs="x"), "token_104, layer_7: selected_probs is 'x', expected 4 numbers"),
        (edited(selected_probs=[1, 0, 0, float("nan")]), "request 0, token 1, layer 7: gate is nan"),
        (edited(selected_probs=...), "selected_probs is missing in 1 cells, expected it in all or in none"),
        (with_tokens(lambda data: data.pop(1)), "token_105 follows token_103, expected consecutive positions"),
        (with_tokens(lambda data: data.append(data[0])), "router_data 3: token_103 appears twice"),
        (with_tokens(lambda data: data[0].update(tok=1)), "router_data 0: 'tok', expected 'token_<position>'"),
        (with_tokens(lambda data: data[0]["token_103"].popitem()), "token_103: 23 layers, expected 24 (gpt-oss-20b)"),
    ],
)
def test_bad_fingerprint_json(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x_examples.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SpecmdError) as caught:
        import_trace(path, "gpt-oss-fingerprint")
    assert message in str(caught.value) and "x_examples.json" in str(caught.value) and "\n" not in str(caught.value)


def test_fingerprint_without_gates(tmp_path: Path) -> None:
    one = example()
    for token in one["router_data"]:
        for layers in token.values():
            for cell in layers.values():
                del cell["selected_probs"]
    (tmp_path / "1_examples.json").write_text(json.dumps(one))
    assert import_trace(tmp_path, "gpt-oss-fingerprint").gates is None
    (tmp_path / "0_examples.json").write_text(json.dumps(example()))
    with pytest.raises(SpecmdError, match="request 1 has no selected_probs, expected them in all or in none"):
        import_trace(tmp_path, "gpt-oss-fingerprint")


# ------------------------------------------------------------------------------------------- table and command


@pytest.mark.parametrize("name", IMPORTERS)
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecmdError, match=r"gone\.csv: no such file"):
        import_trace(tmp_path / "gone.csv", name)
    with pytest.raises(SpecmdError, match=r"not a file|no \*_examples.json in this folder"):
        import_trace(tmp_path, name)
    (tmp_path / "bytes.npz").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(SpecmdError, match=r"bytes\.npz: cannot read"):
        import_trace(tmp_path / "bytes.npz", name)


def test_unknown_format() -> None:
    with pytest.raises(SpecmdError, match="unknown trace format 'bigmoe'; did you mean 'bigmoe-csv'"):
        import_trace("x", "bigmoe")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.import_trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])


def test_command_line(tmp_path: Path) -> None:
    source, target = csv(tmp_path), tmp_path / "out.npz"
    done = run("--format", "bigmoe-csv", source, target)
    assert done.returncode == 0, done.stderr
    assert load_trace(target).tokens == 5
    for line in ("requests      2", "tokens        5 (3 prompt, 2 decode)", "top-k         2", sha256(target)):
        assert line in done.stdout
    again = run("--format", "bigmoe-csv", source, target)
    assert again.returncode == 2 and again.stderr == f"error: {target}: already exists; --overwrite replaces it\n"
    assert run("--format", "bigmoe-csv", source, target, "--overwrite").returncode == 0
    bad = run("--format", "gpt-oss-fingerprint", source, tmp_path / "new.npz")
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "t.csv"]
