"""Foreign formats beside those of `test_importers`: what is read, and how a bad file is named."""

from __future__ import annotations

import base64
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_importer_cases import SIZES, case, drawn, warnings_of

from specmd_jax.errors import SpecmdError
from specmd_jax.trace import IMPORTERS, import_trace
from specmd_jax.trace.importers.table import recognise

IDS = drawn(6)  # [6 tokens, 3 layers, 2]: 4 prompt and 2 decoded


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def raw(ids: np.ndarray, dtype: str = "<i4") -> str:
    return base64.b64encode(ids.astype(dtype).tobytes()).decode()


def refused(path: Path, message: str, fmt: str = "auto", **options: Any) -> None:
    with pytest.raises(SpecmdError) as caught:
        import_trace(path, fmt, **(SIZES | options))
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


# --------------------------------------------------------------------------------------------- responses and rollouts


def sglang(ids: np.ndarray = IDS, dtype: str = "<i4", **info: Any) -> dict[str, Any]:
    meta = {"prompt_tokens": 4, "completion_tokens": 3, "routed_experts": raw(ids, dtype)}
    return {"text": "x", "output_ids": [1, 2, 3], "meta_info": meta | info}


def test_sglang_responses(tmp_path: Path) -> None:
    dense = np.concatenate([np.full((6, 1, 2), -1), IDS], axis=1)
    byte = sglang(dense, "u1", routed_experts_dtype="uint8")
    path = lines(tmp_path / "r.jsonl", sglang(dense), sglang(np.vstack([dense, dense[:1]])), byte)
    trace = import_trace(path, top_k=2, **SIZES)
    assert trace.lengths.tolist() == [6, 7, 6] and trace.prompt_lengths.tolist() == [4, 4, 4]
    np.testing.assert_array_equal(trace.expert_ids[:6], IDS)
    np.testing.assert_array_equal(trace.expert_ids[13:], IDS)
    assert trace.meta["layer_numbers"] == [1, 2, 3]
    openai = {
        "choices": [{"sgl_ext": {"routed_experts": raw(IDS)}}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3},
    }
    nested = sglang(routed_experts=IDS.tolist())  # as LMDeploy sends them
    cached = sglang(IDS[2:], cached_tokens=2)
    later = sglang(IDS[3:], routed_experts_start_len=3)
    trace = import_trace(
        lines(tmp_path / "o.jsonl", openai, nested, cached, later), "sglang-responses", top_k=2, **SIZES
    )
    assert trace.lengths.tolist() == [6, 6, 4, 3] and trace.prompt_lengths.tolist() == [4, 4, 2, 1]
    assert trace.meta["requests"][2] == {"prompt_tokens": 2, "cached_tokens": 2}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            sglang(IDS[:5]),
            "of 4 prompt and 3 generated tokens has 30 numbers, expected a multiple of 6 x 2",
        ),
        (
            sglang(routed_experts=IDS[:4].tolist()),
            "4 rows of routed experts, expected 6 (4 prompt and 3 generated",
        ),
        (sglang(routed_experts_dtype="float32"), "routed_experts_dtype is 'float32', expected one of int8, uint8"),
        (sglang(routed_experts=None), "routed_experts is missing (was return_routed_experts set"),
        (sglang(routed_experts="!"), "routed_experts is text, expected base64"),
        (sglang(routed_experts="AAA="), "has 2 bytes, expected a multiple of 4 (int32)"),
        (sglang(prompt_tokens=None), "prompt_tokens is missing"),
        ({"meta_info": [], "routed_experts": 0}, "meta_info is [], expected an object with routed_experts"),
    ],
)
def test_bad_sglang_responses(tmp_path: Path, record: Any, message: str) -> None:
    refused(lines(tmp_path / "r.jsonl", record), message, top_k=2)


def vllm(ids: Any, prompt: int = 4, answer: int = 3, **rest: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": answer}
    return {"usage": usage | rest, "choices": [{"provider_specific_fields": {"routed_experts": ids}}]}


def test_vllm_lists_and_cached_prompts(tmp_path: Path) -> None:
    cached = vllm(IDS[1:].tolist(), prompt_tokens_details={"cached_tokens": 1})
    answer = {"usage": {"prompt_tokens": 4, "completion_tokens": 2}, "choices": [{"routed_experts": IDS[4:].tolist()}]}
    path = lines(tmp_path / "r.jsonl", vllm(IDS.tolist()), cached, answer)
    trace = import_trace(path, **SIZES)
    assert trace.lengths.tolist() == [6, 5, 2] and trace.prompt_lengths.tolist() == [4, 3, 0]
    refused(lines(path, vllm(IDS[:5].tolist())), "choice 0: 5 rows of routed experts, expected 6 (4 prompt and 3 gen")
    refused(lines(path, vllm(IDS.tolist(), answer=5)), "choice 0: 6 rows of routed experts, expected 8 (4 prompt and 5")


def payload(ids: np.ndarray = IDS, dtype: str = "uint8", **rest: Any) -> dict[str, Any]:
    data = base64.b64encode(ids.astype(dtype).tobytes()).decode()
    return {"data": data, "shape": list(ids.shape), "dtype": dtype} | rest


def tokens(routed: Any) -> dict[str, Any]:
    return {"prompt_ids": [1] * 4, "completion_ids": [2] * 3, "routed_experts": routed}


def test_rollouts(tmp_path: Path) -> None:
    old = payload()
    del old["dtype"]  # of the time when it was always uint8
    nemo = {
        "prompt_token_ids": [1] * 4,
        "generation_token_ids": [2] * 3,
        "routed_experts": f"nrlre1:int16:6x3x2:{raw(IDS, '<i2')}",
    }
    dynamo = {
        "choices": [{}],
        "usage": {"prompt_tokens": 4},
        "nvext": {"engine_data": {"completion_token_ids": [0] * 3, "routed_experts": payload(IDS[2:], start=2)}},
    }
    records = [
        {"trajectory": [{"tokens": tokens(payload(dtype="int16"))}, {"tokens": tokens(old)}]},
        {"response": {"output": [{"type": "reasoning"}, nemo]}},
        dynamo,
    ]
    path = lines(tmp_path / "r.jsonl", *records)
    trace = import_trace(path, **SIZES)
    assert trace.lengths.tolist() == [6, 6, 6, 4] and trace.prompt_lengths.tolist() == [4, 4, 4, 2]
    for start in (0, 6, 12):
        np.testing.assert_array_equal(trace.expert_ids[start : start + 6], IDS)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (tokens(payload(shape=[6, 3, 3])), "routed_experts: data has 36 bytes, expected 54 (uint8 [6, 3, 3])"),
        (tokens(payload(shape=[6, 3])), "shape is [6, 3], expected [tokens, layers, k]"),
        (tokens(payload(shape=[1 << 40, 1 << 40, 2])), "expected [tokens, layers, k]"),
        (tokens(payload(IDS[:3])), "3 rows of routed experts, expected 6 (4 prompt and 3 generated tokens"),
        (tokens(payload() | {"dtype": "f8"}), "dtype is 'f8', expected one of int8"),
        (tokens("nrlre1:int8:2x3:AAAA"), "expected nrlre1:<dtype>:<T>x<L>x<K>:<base64>"),
        ({"routed_experts": payload()}, "how many tokens are prompt is not said"),
        ({"steps": [{"routed_experts": None}]}, "no object with routed_experts"),
    ],
)
def test_bad_rollouts(tmp_path: Path, record: Any, message: str) -> None:
    refused(lines(tmp_path / "r.jsonl", {"tokens": record}), message, "rollouts")


# ----------------------------------------------------------------------------------------------------- rows of tokens


def test_lattice_and_mer(tmp_path: Path) -> None:
    rows = [
        {
            "token_idx": t,
            "layer_idx": layer,
            "selected_ids": IDS[t, layer].tolist(),
            "gate_weights": [0.25, 0.75],
            "x": 1,
        }
        for t in (0, 1, 0, 1, 2)
        for layer in range(3)
    ]
    trace = import_trace(lines(tmp_path / "l.jsonl", *rows), **SIZES)
    assert trace.lengths.tolist() == [2, 3]  # token 0 comes again: another request
    np.testing.assert_array_equal(trace.expert_ids[0], IDS[0, :, ::-1])  # by falling gate
    assert trace.gates is not None and trace.gates[0, 0].tolist() == [0.75, 0.25]
    assert "prompt tokens are not told from decoded ones" in warnings_of(trace)[0]
    mer = [
        {"token": r["token_idx"], "layer": r["layer_idx"], "experts": r["selected_ids"], "cache_hit": [1]} for r in rows
    ]
    plain = import_trace(lines(tmp_path / "m.jsonl", *mer), **SIZES)
    np.testing.assert_array_equal(plain.expert_ids[0], IDS[0])
    refused(lines(tmp_path / "l.jsonl", rows[0] | {"gate_weights": [1]}), "gate_weights is [1], expected 2 numbers")


def test_interleaved_requests_are_named(tmp_path: Path) -> None:
    head = {"phase": "decode", "layer_id": 0, "token_position": 0}
    rows = [head | {"request_id": r, "token_position": t, "expert_ids": [r, 7]} for t in range(2) for r in (0, 1)]
    trace = import_trace(lines(tmp_path / "m.jsonl", *rows), **SIZES)
    assert trace.lengths.tolist() == [2, 2] and any("requests alternate" in note for note in warnings_of(trace))


LAB = {"record_type": "metadata", "format": "moe-cache-lab.routing-jsonl", "model_id": "toy"}


def selection(token: int, layer: int, phase: str, **rest: Any) -> dict[str, Any]:
    chosen = {"selected_experts": IDS[token, layer].tolist(), "selected_probabilities": [0.5, 0.25]}
    return {"record_type": "routing_selection", "phase": phase, "token_position": token, "layer": layer} | chosen | rest


def test_cache_lab(tmp_path: Path) -> None:
    prompt = [selection(t, layer, "prompt") for layer in range(3) for t in range(4)]
    answer = [selection(t, layer, "generated") for t in (4, 5) for layer in range(3)]
    path = lines(tmp_path / "v1.jsonl", LAB | {"format_version": 1, "num_experts": 8}, *prompt, *answer)
    trace = import_trace(path, expert_bytes=100)
    np.testing.assert_array_equal(trace.expert_ids, IDS)
    assert trace.prompt_lengths.tolist() == [4] and trace.gates is not None and trace.model == "toy"
    assert warnings_of(trace) == []

    stages = [{"routing_stage": "encoder", "num_experts": 4}, {"routing_stage": "decoder", "num_experts": 8}]
    dropped = {"assignment_state": "unassigned", "selected_experts": [], "selected_probabilities": []}
    events = [
        selection(0, 0, "source", routing_stage="encoder", assignment_state="assigned"),
        *(selection(t, 0, "decoder_prompt", routing_stage="decoder") for t in range(2)),
        selection(2, 0, "decoder_generated", routing_stage="decoder", **dropped),
    ]
    path = lines(tmp_path / "v2.jsonl", LAB | {"format_version": 2, "routing_stages": stages}, *events)
    trace = import_trace(path, expert_bytes=100)
    assert trace.expert_ids[:, 0].tolist() == [*IDS[:2, 0].tolist(), [-1, -1]]
    assert trace.experts == 8 and trace.prompt_lengths.tolist() == [2]
    assert warnings_of(trace)[0].startswith("1 selections of the encoder are left out")
    refused(lines(path, LAB | {"format_version": 3}, *events), "line 1: ", "moe-cache-lab")
    refused(lines(path, LAB | {"format_version": 1}, {"x": 1}), "line 2: record_type is None", "moe-cache-lab")


def test_policylang_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [(t, layer) for t in range(6) for layer in range(3)]
    columns = {
        "prompt_id": ["a"] * 18,
        "token_idx": [t for t, _ in rows],
        "layer_idx": [layer for _, layer in rows],
        "selected_experts": [IDS[t, layer].tolist() for t, layer in rows],
        "router_scores": [[0.75, 0.25]] * 18,
        "phase": ["prefill" if t < 4 else "decode" for t, _ in rows],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    trace = import_trace(tmp_path / "t.parquet", **SIZES)
    np.testing.assert_array_equal(trace.expert_ids, IDS)
    assert trace.prompt_lengths.tolist() == [4] and trace.gates is not None
    del columns["layer_idx"]
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", "column 'layer_idx' is missing (found: prompt_id, token_idx", "moe-policylang")


def test_flame(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for layer in range(3):  # named so that text order is another
        scores = pa.array([[0.25, 0.5]] * 6, pa.list_(pa.float16()))
        indices = pa.array(IDS[:, layer].tolist(), pa.list_(pa.int16()))
        (tmp_path / f"layer-{layer * 5}").mkdir()
        pq.write_table(pa.table({"scores": scores, "indices": indices}), tmp_path / f"layer-{layer * 5}" / "0.parquet")
    pq.write_table(pa.table({"token_id": [1] * 6}), tmp_path / "samples.parquet")
    trace = import_trace(tmp_path, **SIZES)
    np.testing.assert_array_equal(trace.expert_ids, IDS[..., ::-1])
    assert trace.meta["layer_numbers"] == [0, 5, 10] and trace.gates is not None
    assert "tokens of training" in warnings_of(trace)[0]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "t.parquet", "t.parquet: needs pyarrow to be read (pip install 'specmd-jax[parquet]')")


# -------------------------------------------------------------------------------------------------- passes and layers


def test_llamacpp(tmp_path: Path) -> None:
    def written(block: np.ndarray, last: int | None = None) -> list[str]:
        rows = [(layer, block[-last:] if last and layer == 2 else block) for layer in range(3)]
        return [f"{layer},{e}" for layer, part in rows for e in part[:, layer].reshape(-1)]

    first = [*written(IDS[:4], last=1), *written(IDS[4:5]), *written(IDS[5:6])]
    path = tmp_path / "moe_trace.csv"
    path.write_text("\n".join(["layer,expert", *first, *written(IDS[:2]), *written(IDS[2:3])]) + "\n")
    trace = import_trace(path, top_k=2, **SIZES)
    assert trace.lengths.tolist() == [6, 3] and trace.prompt_lengths.tolist() == [4, 2]
    expected = IDS.copy()
    expected[:3, 2] = -1
    np.testing.assert_array_equal(trace.expert_ids, np.vstack([expected, IDS[:3]]))
    assert any("where a token ends is not in the file" in note for note in warnings_of(trace))
    refused(path, "does not say top_k, expected it to be given")
    refused(path, "line 2: 8 lines of layer 0, expected a multiple of 3 (top_k)", top_k=3)
    path.write_text("0,1\n0,x\n")
    refused(path, "line 2: '0,x', expected layer,expert", "llamacpp-csv", top_k=1)


ROUTE = {"format": "vference.route-trace.v1", "prompt_tokens": 4, "output_tokens": [5, 6, 7]}


def route(ids: np.ndarray = IDS) -> dict[str, Any]:
    passes = [ids[:4], ids[4:5], ids[5:6]]
    records = [{"layer_id": 2 * n, "expert_ids": one[:, n].tolist()} for one in passes for n in range(3)]
    return ROUTE | {"records": records}


def test_vference(tmp_path: Path) -> None:
    path = lines(tmp_path / "v.json", route())
    trace = import_trace(path, **SIZES)
    np.testing.assert_array_equal(trace.expert_ids, IDS)
    assert trace.prompt_lengths.tolist() == [4] and trace.meta["layer_numbers"] == [0, 2, 4]
    heads = route()
    heads["records"].insert(3, {"layer_id": 9, "expert_ids": drawn(9)[:, 0].tolist()})
    trace = import_trace(lines(path, heads), **SIZES)
    assert trace.layers == 3 and "layer 9 has more rows than tokens" in warnings_of(trace)[0]
    refused(lines(path, route() | {"prompt_tokens": 5}), "v.json: 6 rows, expected 7 (5 prompt and 3 output tokens")
    refused(lines(path, ROUTE | {"records": []}), "records are [], expected a list of them")


def test_layers_go_by_number() -> None:
    trace = case(11, experts=16)
    assert trace.expert_ids[0].tolist() == [[n, n + 1] for n in range(12)]


def test_layer_lists(tmp_path: Path) -> None:
    named = {f"layer_{n}": IDS[:, n].tolist() for n in range(3)}
    path = lines(tmp_path / "l.json", named | {"layer_3": IDS[:2, 0].tolist(), "prompt_tokens": 4, "model": "toy"})
    trace = import_trace(path, **SIZES)
    np.testing.assert_array_equal(trace.expert_ids, IDS)
    assert trace.prompt_lengths.tolist() == [4] and trace.model == "toy"
    assert warnings_of(trace) == ["layer 3 has another number of rows than most: left out"]
    refused(lines(path, {"layers": {"0": [[1, 2]], "x": []}}), "layer 'x', expected a number")
    refused(lines(path, {"layers": {"0": [[1, 2]], "1": [[1]]}}), "layers with other numbers of experts")


def test_drafts_that_were_rejected() -> None:
    trace = case(13)
    rejected = trace.meta["rejected"][0]
    assert rejected == [2, 3, 4] and "accepted" not in trace.meta
    demand = len(set(trace.expert_ids[:5].reshape(-1).tolist()))
    assert demand == 8 and demand / (5 - len(rejected)) == 8 / 2  # loads per kept token
    assert set(trace.expert_ids[5:].reshape(-1).tolist()) == {1, 2, 3}
    kept = case(13, strip="drafts")
    assert kept.tokens == 7 and kept.meta["accepted"] == [[2, 5]] and "rejected" not in kept.meta


def test_allenai(tmp_path: Path) -> None:
    record = {"input_ids": [[1] * 6], "predicted_token_ids": [2] * 6, "exp_ids": IDS.swapaxes(1, 2).tolist()}
    path = lines(tmp_path / "c4_results.jsonl", record)
    trace = import_trace(path, **SIZES)
    np.testing.assert_array_equal(trace.expert_ids, IDS)
    assert trace.prompt_lengths.tolist() == [6] and "nothing was generated" in warnings_of(trace)[0]
    refused(lines(path, record | {"input_ids": [1] * 5}), "line 1: exp_ids has 6 rows, expected 5 (its input_ids)")


def beyond(path: Path, batches: list[int], layers: int = 3) -> Path:
    rows = [f'{n + 1},{batches[t]},"a, b","{IDS[t, n].tolist()}"' for n in range(layers) for t in range(len(batches))]
    path.write_text("\n".join(["Layer ID,Batch Number,Token,Activated Expert IDs", *rows]) + "\n")
    return path


def test_moe_beyond(tmp_path: Path) -> None:
    trace = import_trace(beyond(tmp_path / "b.csv", [0, 0, 0, 0, 1, 2]), **SIZES)
    np.testing.assert_array_equal(trace.expert_ids, IDS)
    assert trace.prompt_lengths.tolist() == [4] and trace.meta["layer_numbers"] == [1, 2, 3]
    beyond(tmp_path / "a.csv", [1, 1, 3, 3])
    trace = import_trace(tmp_path, **SIZES)
    assert trace.lengths.tolist() == [2, 2, 6] and trace.prompt_lengths.tolist() == [0, 0, 4]
    (tmp_path / "b.csv").write_text('Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,x,"[1, 2"\n')
    refused(tmp_path / "b.csv", "b.csv, line 2: Activated Expert IDs is '[1, 2', expected a list of expert ids")


def test_router_trace(tmp_path: Path) -> None:
    share = np.random.default_rng(3).dirichlet(np.ones(8), (4, 3)).astype(np.float32)
    record = np.dtype([("token", "<i4"), ("layer", "<i4"), ("share", "<f4", (8,))])
    rows = np.zeros(12, record)
    rows["token"], rows["layer"] = np.repeat([0, 1, 0, 1], 3), np.tile([0, 1, 2], 4)
    rows["share"] = share.reshape(12, 8)
    path = tmp_path / "r.bin"
    path.write_bytes(b"RTRACE01" + np.array([8, 1], "<i4").tobytes() + rows.tobytes())
    trace = import_trace(path, expert_bytes=100, top_k=2)
    assert trace.lengths.tolist() == [2, 2] and trace.logits is not None and trace.gates is not None
    np.testing.assert_array_equal(trace.expert_ids, np.argsort(-share, axis=-1)[..., :2])
    np.testing.assert_allclose(np.exp(trace.logits), share, rtol=1e-6)
    np.testing.assert_allclose(trace.gates.sum(-1), 1, rtol=1e-6)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "expected a multiple of 40", experts=None, top_k=2)


def test_cache_eval(tmp_path: Path) -> None:
    events, uses, offsets = [], [], [0]
    gates = np.tile(np.array([0.75, 0.25]), (6, 3, 1))
    for step, block in enumerate([slice(0, 4), slice(4, 5), slice(5, 6)]):
        for layer in range(3):
            chosen, share = IDS[block, layer].reshape(-1), gates[block, layer].reshape(-1)
            for expert in np.unique(chosen):
                uses.append((expert, (chosen == expert).sum(), share[chosen == expert].sum()))
            offsets.append(len(uses))
            events.append((3, step, step, int(step > 0), layer, block.stop - block.start))
    columns = dict(zip(("request_indices", "scheduler_steps", "forward_cycles", "phases", "layer_ids", "token_counts"),
                       np.array(events).T, strict=True))  # fmt: skip
    arrays = {name: values.astype(np.int32) for name, values in columns.items()}
    arrays |= {"offsets": np.array(offsets), "expert_ids": np.array([e for e, _, _ in uses], np.int16)}
    arrays |= {"assignment_counts": np.array([n for _, n, _ in uses], np.int32)}
    arrays |= {"gate_mass": np.array([m for _, _, m in uses], np.float32)}
    kinds = {"int32": "I32", "int64": "I64", "int16": "I16", "float32": "F32"}
    header, body = {}, b""
    for name, values in arrays.items():
        end = len(body) + values.nbytes
        header[name] = {
            "dtype": kinds[str(values.dtype)],
            "shape": list(values.shape),
            "data_offsets": [len(body), end],
        }
        body += values.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "events.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    digest = sha256((tmp_path / "events.safetensors").read_bytes()).hexdigest()
    manifest = {
        "schema_version": 1,
        "model": {"num_layers": 3, "num_experts": 8, "name": "toy"},
        "artifacts": {"events": {"path": "events.safetensors", "sha256": digest}},
    }
    lines(tmp_path / "manifest.json", manifest)
    trace = import_trace(tmp_path, expert_bytes=100)
    assert trace.lengths.tolist() == [6] and trace.prompt_lengths.tolist() == [4] and trace.model == "toy"
    np.testing.assert_array_equal(trace.expert_ids[4:], IDS[4:])
    assert trace.gates is not None
    for layer in range(3):  # experts, counts and gate sums of the prompt's pass are exact
        for expert in range(8):
            mine, true = trace.expert_ids[:4, layer] == expert, IDS[:4, layer] == expert
            assert mine.sum() == true.sum()
            np.testing.assert_allclose(
                trace.gates[:4, layer][mine].sum(), gates[:4, layer][true].sum(), rtol=1e-6, atol=1e-7
            )
    assert "rows of prompts are dealt" in warnings_of(trace)[0]
    lines(
        tmp_path / "manifest.json", manifest | {"artifacts": {"events": {"path": "events.safetensors", "sha256": "0"}}}
    )
    refused(tmp_path, "events.safetensors: its sha256 is not '0'", experts=None)


# ------------------------------------------------------------------------------------------------------ recognising


def test_unknown_files_list_the_formats(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.json", {"a": 1})
    with pytest.raises(SpecmdError, match="not of a known format, expected one of: vllm, sglang-responses"):
        recognise(path)
    with pytest.raises(SpecmdError, match="not of a known format"):
        recognise(tmp_path)
    with pytest.raises(SpecmdError, match="gone: no such file"):
        recognise(tmp_path / "gone")


def test_files_of_two_formats_ask_which(tmp_path: Path) -> None:
    both = {"token_idx": 0, "layer_idx": 0, "selected_ids": [1, 2], "token": 0, "layer": 0, "experts": [1, 2]}
    path = lines(tmp_path / "x.jsonl", both)
    with pytest.raises(SpecmdError, match="may be of the formats lattice, mer: expected one of them to be named"):
        import_trace(path, **SIZES)
    assert import_trace(path, "MER", **SIZES).tokens == 1


@pytest.mark.parametrize("name", IMPORTERS)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{", b"[[1, 2]]", b"0,1\n", b"PK\x03\x04"])
def test_no_file_makes_a_reader_stumble(tmp_path: Path, name: str, content: bytes) -> None:
    for suffix in (".json", ".jsonl", ".csv", ".npz", ".bin"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        sizes: dict[str, Any] = {} if IMPORTERS[name].has_sizes else SIZES | {"top_k": 2}
        with pytest.raises(SpecmdError) as caught:
            import_trace(path, name, **sizes)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
