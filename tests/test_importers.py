"""Foreign traces: what is read, and how a bad file is named."""

from __future__ import annotations

import base64
import gzip
import io
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
from specmd_jax.files import file_sha256
from specmd_jax.trace import IMPORTERS, bundled, import_trace, load_trace, read_bigmoe

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
        ({"meta": np.array("[")}, "meta: Expecting value"),
        ({"meta": np.array({}, dtype=object)}, "holds a pickled object"),
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


# ------------------------------------------------------------------------------------------------------- vllm

SIZES: dict[str, Any] = {"experts": 8, "expert_bytes": 100}
P_IDS = [[[1, 2], [3, 4]], [[-1, -1], [5, 6]], [[7, 0], [1, 3]]]  # [3 prompt tokens, 2 layers, 2]
G_IDS = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
H_IDS = [[[6, 1], [2, 0]]]


def lines(tmp_path: Path, *records: Any, name: str = "r.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def base64_npy(ids: Any) -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.array(ids, np.int16))
    return base64.b64encode(buffer.getvalue()).decode()


def response(*choices: Any, prompt: Any = P_IDS, **rest: Any) -> dict[str, Any]:
    head = {"id": "cmpl-1", "model": "org/some-model", "prompt_routed_experts": prompt}
    return head | {"choices": [{"index": i, "routed_experts": ids} for i, ids in enumerate(choices)]} | rest


def test_vllm_responses(tmp_path: Path) -> None:
    trace = import_trace(lines(tmp_path, response(G_IDS, H_IDS), "\n", response(H_IDS, prompt=None)), "vllm", **SIZES)
    assert trace.expert_ids.tolist() == P_IDS + G_IDS + H_IDS + H_IDS
    assert trace.lengths.tolist() == [5, 1, 1] and trace.prompt_lengths.tolist() == [3, 0, 0]
    assert trace.model == "org/some-model" and trace.expert_bytes.tolist() == [100, 100]
    assert trace.gates is None


def test_vllm_base64(tmp_path: Path) -> None:
    whole = response(base64_npy(P_IDS + G_IDS), base64_npy(P_IDS + H_IDS), prompt=None, usage={"prompt_tokens": 3})
    named = response(base64_npy(P_IDS + H_IDS), prompt=None, prompt_token_ids=[9, 9, 9])
    split = response(base64_npy(G_IDS), prompt=base64_npy(P_IDS))
    trace = import_trace(lines(tmp_path, whole, named, split), "vllm", **SIZES)
    assert trace.expert_ids.tolist() == P_IDS + G_IDS + H_IDS + P_IDS + H_IDS + P_IDS + G_IDS
    assert trace.lengths.tolist() == [5, 1, 4, 5] and trace.prompt_lengths.tolist() == [3, 0, 3, 3]


def test_vllm_arrays(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    blocks = {"prompt_routed_experts": np.array(P_IDS, np.int16), "routed_experts": np.array(G_IDS, np.int16)}
    np.savez(path, allow_pickle=False, **blocks)
    one = import_trace(path, "vllm", **SIZES)
    assert one.expert_ids.tolist() == P_IDS + G_IDS and one.prompt_lengths.tolist() == [3]
    many = {f"{i}/{name}": block for i in (10, 2) for name, block in blocks.items()}
    many["2/routed_experts"] = np.array(H_IDS, np.int16)
    np.savez(path, allow_pickle=False, model=np.array("m"), **many)
    two = import_trace(path, "vllm", **SIZES)
    assert two.lengths.tolist() == [4, 5] and two.model == "m"  # records by number, not by name


def test_sizes_of_a_known_model(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (2, 32, 1)), axis=-1)[..., :2].tolist()
    record = {"model": "mistralai/Mixtral-8x7B", "routed_experts": ids}
    trace = import_trace(lines(tmp_path, record), "vllm")
    assert (trace.model, trace.experts) == ("Mixtral-8x7B", 8)
    assert trace.expert_bytes.tolist() == [3 * 4096 * 14336 * 2] * 32
    renamed = lines(tmp_path, record | {"model": "mine"}, name="mine.jsonl")
    assert import_trace(renamed, "vllm", model="Mixtral-8x7B").expert_bytes[0] == trace.expert_bytes[0]
    assert import_trace(lines(tmp_path, record), "vllm", experts=9, expert_bytes=5).experts == 9
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "does not say experts, expected it to be given, or the model (one of OLMoE"),
        ({"experts": 8}, "does not say expert_bytes"),
        ({"experts": 0, "expert_bytes": 1}, "experts is 0, expected at least 1"),
        ({"model": "Mixtral"}, "unknown model 'Mixtral'; did you mean 'Mixtral-8x7B'"),
        ({"model": "OLMoE-1B-7B"}, "32 MoE layers and 2 experts per token, expected 16 and 8 as OLMoE-1B-7B has"),
    )
    for options, message in cases:
        with pytest.raises(SpecmdError) as caught:
            import_trace(renamed, "vllm", **options)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SpecmdError, match="model is given, expected none: files of bigmoe-csv say"):
        import_trace(csv(tmp_path), "bigmoe-csv", model="Mixtral-8x7B")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{\n", "r.jsonl, line 2: Expecting property name"),
        ([1], "r.jsonl, line 2: [1], expected a JSON object"),
        ({}, "r.jsonl, line 2: routed_experts is missing (was --enable-return-routed-experts set?)"),
        (response(), "line 2: choices are not a list of objects"),
        (response(None, prompt=None), "line 2, choice 0: routed_experts is missing"),
        (response(3), "line 2, choice 0: routed_experts is 3, expected lists [tokens][layers][k]"),
        (response([[[1, 2]]]), "line 2, choice 0: routed_experts has 1 layers of 2 experts, expected 2 of 2"),
        (response([[[1, 2]]], prompt=None), "line 2 has 1 layers of 2 experts, expected 2 of 2 as before"),
        (
            response(G_IDS, prompt=[*P_IDS, [[1, 2]]]),
            "prompt_routed_experts, token 3: [[1, 2]], expected a list of 2 l",
        ),
        (response([*G_IDS, [[1, 2], [3]]]), "choice 0: routed_experts, token 2, layer 1: [3], expected 2 expert ids"),
        (response([*G_IDS, [[1, 2], [3, 0.5]]]), "routed_experts, token 2, layer 1: [3, 0.5], expected 2 expert ids"),
        (response([*G_IDS, [[1, 2], [3, 8]]]), "r.jsonl: request 1, token 5, layer 1: expert id is 8"),
        (response([*G_IDS, [[1, 2], [3, 3]]]), "r.jsonl: request 1, token 5, layer 1: expert 3 appears twice"),
        (response("abc!", prompt=None), "choice 0: routed_experts is text, expected base64 of a .npy file"),
        (response("AAAA", prompt=None), "choice 0: routed_experts is text, expected base64 of a .npy file"),
        (
            response(base64_npy([1.0]), prompt=None),
            "routed_experts is int16 [1], expected integers [tokens, layers, k]",
        ),
        (response(base64_npy(G_IDS), prompt=None), "covers prompt and answer and usage.prompt_tokens is None"),
        (response(base64_npy(G_IDS), prompt=None, usage={"prompt_tokens": 3}), "prompt_tokens is 3, expected 0 to 2"),
        (response(G_IDS, model="other"), "line 2: model is 'other', expected 'org/some-model' as before"),
    ],
)
def test_bad_vllm(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        import_trace(lines(tmp_path, response(G_IDS), record), "vllm", **SIZES)
    assert message in str(caught.value) and "r.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_groups_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", allow_pickle=False, **{"x/routed_experts": np.array(G_IDS)})
    with pytest.raises(SpecmdError, match=r"r\.npz: array group 'x', expected the number of a record"):
        import_trace(tmp_path / "r.npz", "vllm", **SIZES)
    np.savez(tmp_path / "r.npz", allow_pickle=False, **{"0/routed_experts": np.zeros((1, 2, 2))})
    with pytest.raises(SpecmdError, match=r"record 0: routed_experts is float64 \[1, 2, 2\], expected integers"):
        import_trace(tmp_path / "r.npz", "vllm", **SIZES)
    with pytest.raises(SpecmdError, match=r"e\.jsonl: no records"):
        import_trace(lines(tmp_path, name="e.jsonl"), "vllm", **SIZES)


# ----------------------------------------------------------------------------------------------------- sglang

PLACES = [[0, 1, 2, 3, 3, 2], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]]  # physical -> logical; the first layer has spares


def sglang_pass(mode: int, positions: list[int], seed: int, lengths: list[int] | None = None, **rest: Any) -> Any:
    """A pass with random physical ids in layers 0 and 2, and a place that no token uses."""
    rng = np.random.default_rng(seed)
    ids = np.full((3, len(positions), 3), -1)
    for layer in (0, 2):
        ids[layer, :, :2] = [rng.permutation(4)[:2] for _ in positions]
    record = {"forward_pass_id": seed, "rank": 0, "forward_mode": mode, "positions": positions}
    return record | {"topk_ids_of_layer": ids.tolist(), "extend_seq_lens": lengths} | rest


def logical(record: Any, token: int) -> list[list[int]]:
    cells = np.array(record["topk_ids_of_layer"])[:, token, :2]
    return [[PLACES[layer][e] for e in cells[layer]] for layer in (0, 2)]


def dump(tmp_path: Path, *records: Any, mapping: Any = PLACES) -> Path:
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"records": records, "last_physical_to_logical_map": mapping}))
    return path


def test_sglang(tmp_path: Path) -> None:
    a = sglang_pass(1, [0, 1, 2, 0, 1], 0, [3, 2])  # two requests
    b = sglang_pass(2, [3, 2], 1)
    idle = {"forward_mode": 4, "positions": [], "rank": 0}
    c = sglang_pass(1, [8, 9], 2, [2])  # eight tokens out of the prefix cache
    d = sglang_pass(1, [10], 3, [1])  # and the prompt's next chunk
    e = sglang_pass(2, [4, 11], 4)  # the second request has ended
    path = dump(tmp_path, a, b, idle, c, d, e)
    trace = import_trace(path, "sglang", expert_bytes=10)
    expected = [(a, 0), (a, 1), (a, 2), (b, 0), (e, 0), (a, 3), (a, 4), (b, 1), (c, 0), (c, 1), (d, 0), (e, 1)]
    assert trace.expert_ids.tolist() == [logical(*cell) for cell in expected]
    assert trace.lengths.tolist() == [5, 3, 4] and trace.prompt_lengths.tolist() == [3, 2, 3]
    assert trace.experts == 6 and trace.expert_bytes.tolist() == [10, 10]
    assert trace.meta["layer_numbers"] == [0, 2] and trace.meta["rank"] == 0

    arrays = {"last_physical_to_logical_map": np.array(PLACES)}
    for index, record in enumerate((a, b, idle, c, d, e)):
        arrays |= {f"{index}/{key}": np.array(value) for key, value in record.items() if value is not None}
    np.savez(tmp_path / "d.npz", allow_pickle=False, **arrays)
    np.testing.assert_array_equal(
        import_trace(tmp_path / "d.npz", "sglang", expert_bytes=10).expert_ids, trace.expert_ids
    )


def test_sglang_one_request_after_another(tmp_path: Path) -> None:
    records = [
        sglang_pass(1, [0, 1], 0),
        sglang_pass(2, [2], 1),
        sglang_pass(1, [0, 1, 2], 2),  # as long as the first one was: the newer goes on
        sglang_pass(2, [3], 3),
    ]
    trace = import_trace(dump(tmp_path, *records, mapping=None), "sglang", **SIZES)
    assert trace.lengths.tolist() == [3, 4] and trace.prompt_lengths.tolist() == [2, 3] and trace.experts == 8


def test_sglang_names_tell_requests_apart(tmp_path: Path) -> None:
    start = sglang_pass(1, [0, 1, 0, 1], 0, [2, 2])
    one = sglang_pass(2, [2], 1)
    with pytest.raises(SpecmdError) as caught:
        import_trace(dump(tmp_path, start, one), "sglang", **SIZES)
    assert "record 1, token 0: 2 requests wait for position 2 and 1 go on: expected records with rids" in str(
        caught.value
    )
    named = dump(tmp_path, start | {"rids": ["x", "y"]}, one | {"rids": ["y"]})
    trace = import_trace(named, "sglang", **SIZES)
    assert trace.lengths.tolist() == [2, 3] and [row["rid"] for row in trace.meta["requests"]] == ["x", "y"]
    assert trace.expert_ids[-1].tolist() == logical(one, 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (sglang_pass(3, [0], 1), "record 1: forward_mode is 3, expected 1 (prefill), 2 (decode) or 4 (idle)"),
        (sglang_pass(2, [7], 1), "record 1, token 0: no request waits for position 7"),
        (sglang_pass(1, [0, 2], 1), "record 1, token 1: position is 2, expected 1"),
        (sglang_pass(1, [0, 1], 1, [1]), "record 1: extend_seq_lens sum to 1, expected 2"),
        (sglang_pass(2, [2], 1, rank=1), "record 1: rank is 1, expected 0 as before: one file a rank"),
        (sglang_pass(2, [2], 1) | {"positions": [2, 3]}, "record 1: 2 positions, expected 1 (the tokens of topk"),
        (sglang_pass(2, [2], 1, rids=[]), "record 1: rids is [], expected 1 names"),
        (sglang_pass(2, [2], 1, forward_mode="d"), "record 1: forward_mode is 'd', expected an integer >= 0"),
        (sglang_pass(2, [2], 1, topk_ids_of_layer=[[[1]]]), "topk_ids_of_layer has 1 layers, expected 3"),
        (sglang_pass(2, [2], 1, topk_ids_of_layer=[[[6]]] * 3), "record 1, token 0, layer 0: physical expert 6"),
        (sglang_pass(2, [2], 1, topk_ids_of_layer=[[[1]], [["x"]]]), "topk_ids_of_layer, layer 1, token 0: ['x']"),
        ({"forward_mode": 2, "positions": [2]}, "record 1: topk_ids_of_layer is missing"),
        ({"forward_mode": 2}, "record 1: positions is None, expected a list of integers"),
        (3, "record 1: 3, expected an object"),
    ],
)
def test_bad_sglang_records(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        import_trace(dump(tmp_path, sglang_pass(1, [0, 1], 0), record), "sglang", **SIZES)
    assert message in str(caught.value) and "d.json" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_sglang_files(tmp_path: Path) -> None:
    for content, message in (
        ("[]", "d.json: no list 'records'"),
        ("[", "d.json: Expecting value, expected JSON"),
        ('{"records": []}', "d.json: no record of a prefill or a decode"),
        ('{"records": [], "last_physical_to_logical_map": [[1], [1, 2]]}', "expected integers [layers, physical"),
        ('{"logical_count": [[1]]}', "d.json: no list 'records', expected a dump of the mode per_token"),
    ):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(SpecmdError) as caught:
            import_trace(tmp_path / "d.json", "sglang", **SIZES)
        assert message in str(caught.value)


def test_sglang_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "d.pt").write_bytes(b"x")
    with pytest.raises(SpecmdError, match=r"d\.pt: needs torch to be read"):
        import_trace(tmp_path / "d.pt", "sglang", **SIZES)


# ------------------------------------------------------------------------------------------------ plain rows


def sim_row(request: Any, phase: str, token: int, layer: int, *experts: int) -> dict[str, Any]:
    head = {"request_id": request, "phase": phase, "step_id": 0}
    return head | {"token_position": token, "layer_id": layer, "expert_ids": list(experts)}


SIM = [
    sim_row("b", "prefill", 0, 1, 3, 4),
    sim_row("b", "prefill", 0, 0, 1, 2),
    sim_row("a", "decode", 7, 0, 5, 0),
    sim_row("b", "decode", 1, 1, 6, 7),
]


def test_moe_sim(tmp_path: Path) -> None:
    trace = import_trace(lines(tmp_path, *SIM), "moe-sim", **SIZES)
    assert trace.expert_ids.tolist() == [[[1, 2], [3, 4]], [[-1, -1], [6, 7]], [[5, 0], [-1, -1]]]
    assert trace.lengths.tolist() == [2, 1] and trace.prompt_lengths.tolist() == [1, 0]
    assert [row["request"] for row in trace.meta["requests"]] == ["b", "a"]


def test_policylang(tmp_path: Path) -> None:
    keys = {"request_id": "p", "phase": "ph", "token_position": "t", "layer_id": "l", "expert_ids": "e"}
    rows = [{keys[name]: value for name, value in row.items() if name in keys} for row in SIM]
    trace = import_trace(lines(tmp_path, {"format": "header"}, *rows), "moe-policylang", **SIZES)
    np.testing.assert_array_equal(trace.expert_ids, import_trace(lines(tmp_path, *SIM), "moe-sim", **SIZES).expert_ids)


@pytest.mark.parametrize("content", [{"top_k": 2, "moe_expert_trace": None}, {"moe_expert_trace": None}, None])
def test_imp(tmp_path: Path, content: Any) -> None:
    entries = [[0, 1, 2], [2, 3, 4], [0, 5, 6], [2, 7, 0], [2, 1, 2]]
    flat = [number for entry in entries for number in entry]
    if content is not None:
        content["moe_expert_trace"] = flat if "top_k" in content else entries
    path = lines(tmp_path, content or entries, name="i.json")
    trace = import_trace(path, "imp-json", **SIZES)
    assert trace.expert_ids.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 0]], [[-1, -1], [1, 2]]]
    assert trace.meta["layer_numbers"] == [0, 2] and trace.prompt_lengths.tolist() == [0]


@pytest.mark.parametrize(
    ("fmt", "record", "message"),
    [
        ("moe-sim", sim_row("b", "decode", 1, 1, 6, 7), "line 5: token 1, layer 1 of 'b' a second time"),
        ("moe-sim", sim_row("b", "prefill", 1, 0, 6, 7), "line 5: token 1 of 'b' is in two phases"),
        ("moe-sim", sim_row("b", "prefill", 2, 0, 6, 7), "line 5: prompt token 2 comes after a decoded one"),
        ("moe-sim", sim_row("b", "decode", 2, 0, 6), "line 5: 1 experts, expected 2 as before"),
        ("moe-sim", sim_row("b", "think", 2, 0, 6, 7), "line 5: phase is 'think', expected prefill, decode"),
        ("moe-sim", sim_row("b", "decode", -1, 0, 6, 7), "line 5: token_position is -1, expected an integer >= 0"),
        ("moe-sim", sim_row("b", "decode", 2, 0), "line 5: expert_ids is [], expected a list of expert ids"),
        ("moe-sim", sim_row(None, "decode", 2, 0, 6, 7), "line 5: request_id is None, expected a name"),
        ("moe-sim", sim_row("b", "decode", 2, 0, 6, 8), "request 0, token 2, layer 0: expert id is 8"),
        ("moe-policylang", {"x": 1}, "no rows"),
        ("imp-json", [[0, 1], 3], "entry 1: 3, expected [layer, expert, ...]"),
        ("imp-json", {"moe_expert_trace": [0, 1, 2]}, "top_k is None, expected an integer >= 1"),
        ("imp-json", {"top_k": 3, "moe_expert_trace": [0, 1, 2]}, "3 numbers, expected a top_k and a multiple"),
        ("imp-json", [0, 1, 2], "3 numbers, expected a top_k"),
        ("imp-json", {}, "no entries, expected a list 'moe_expert_trace'"),
    ],
)
def test_bad_rows(tmp_path: Path, fmt: str, record: Any, message: str) -> None:
    path = lines(tmp_path, *(SIM if fmt == "moe-sim" else []), record)
    with pytest.raises(SpecmdError) as caught:
        import_trace(path, fmt, **SIZES)
    assert message in str(caught.value) and "r.jsonl" in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- table and command


@pytest.mark.parametrize("name", IMPORTERS)
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecmdError, match=r"gone\.csv: no such file"):
        import_trace(tmp_path / "gone.csv", name)
    with pytest.raises(SpecmdError, match=r"not a file|in this folder|no parquet|manifest\.json: no such file"):
        import_trace(tmp_path, name)
    (tmp_path / "bytes.npz").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(SpecmdError, match=r"bytes\.npz: (cannot read|not a zip|needs pyarrow|expected RTRACE01)"):
        import_trace(tmp_path / "bytes.npz", name)


def test_unknown_format() -> None:
    with pytest.raises(SpecmdError, match="unknown trace format 'bigmoe'; did you mean 'bigmoe-csv'"):
        import_trace("x", "bigmoe")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.import_trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])


def test_help_lists_the_formats() -> None:
    shown = run("--help").stdout
    for name, importer in IMPORTERS.items():
        assert f"  {name} " in shown and importer.about in shown


def test_command_line(tmp_path: Path) -> None:
    source, target = csv(tmp_path), tmp_path / "out.npz"
    done = run("--format", "bigmoe-csv", source, target)
    assert done.returncode == 0, done.stderr
    assert load_trace(target).tokens == 5
    for line in ("requests      2", "tokens        5 (3 prompt, 2 decode)", "top-k         2", file_sha256(target)):
        assert line in done.stdout
    again = run("--format", "bigmoe-csv", source, target)
    assert again.returncode == 2 and again.stderr == f"error: {target}: already exists; --overwrite replaces it\n"
    assert run("--format", "bigmoe-csv", source, target, "--overwrite").returncode == 0
    answers = lines(tmp_path, response(G_IDS))
    done = run("--format", "vllm", "--experts", "8", "--expert-bytes", "9", answers, tmp_path / "v.npz")
    assert done.returncode == 0 and "expert bytes  9\n" in done.stdout, done.stderr
    for path in (answers, tmp_path / "v.npz"):
        path.unlink()
    bad = run("--format", "gpt-oss-fingerprint", source, tmp_path / "new.npz")
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "t.csv"]
