"""Whatever a file holds, its reader gives a value or a `SpecmdError` of one line, in bounded time and memory.

Small valid files are damaged: bytes are flipped, cut and doubled; in JSON values change their type, grow and nest.
``SPECMD_FUZZ=2000`` asks each reader so often.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specmd_jax.errors import MOST_MESSAGE, SpecmdError
from specmd_jax.moe.checkpoint.folder import Checkpoint, load_config
from specmd_jax.moe.model.families.config_json import tiny_hf
from specmd_jax.moe.model.families.table import FAMILIES
from specmd_jax.policies.trained import load
from specmd_jax.report.columns import Column, Table
from specmd_jax.report.reader import read_rows
from specmd_jax.report.studies import redraw
from specmd_jax.report.writer import ResultWriter
from specmd_jax.specs.hardware import HARDWARE, HARDWARE_NOTES, load_hardware, save_hardware
from specmd_jax.specs.models import model
from specmd_jax.trace import load_trace, save_trace
from specmd_jax.trace.importers.table import import_trace
from specmd_jax.trace.profile import load_profile
from specmd_jax.trace.stream import open_trace, stretches
from specmd_jax.trace.synthetic import synthesize
from specmd_jax.types import Trace

EXAMPLES = int(os.environ.get("SPECMD_FUZZ", "12"))
MOST_SECONDS, MOST_KIB = 10.0, 2 << 20

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.5, "", "x", "\ud800", "a\nb\x00", "9" * 400,
    [], {}, [[]], [None], {"a": {}}, [1] * 50, float("nan"), float("inf"), "../../x",
)  # fmt: skip


class Reader(NamedTuple):
    """A file that is damaged, in a folder that is otherwise valid, and what reads it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def text_file(name: str, content: Any) -> Callable[[Path], Path]:
    """Gives what writes a file: text as it is, anything else as JSON."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return make


def small() -> Trace:
    return synthesize(layers=2, experts=4, top_k=2, tokens=6, requests=2, seed=0)


def trace_file(folder: Path) -> Path:
    save_trace(small(), folder / "t.npz")
    return folder / "t.npz"


def arrays_file(**arrays: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez_compressed(folder / "a.npz", **arrays)
        return folder / "a.npz"

    return make


def hardware_file(folder: Path) -> Path:
    save_hardware(HARDWARE["rtx4090"], folder / "h.json", HARDWARE_NOTES["rtx4090"])
    return folder / "h.json"


TENSORS = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}


def tensors_file(folder: Path) -> Path:
    header = json.dumps(TENSORS).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    return folder / "model.safetensors"


def index_file(folder: Path) -> Path:
    tensors_file(folder)
    return text_file("model.safetensors.index.json", {"weight_map": {"a": "model.safetensors"}})(folder)


def read_tensors(path: Path) -> object:
    checkpoint = Checkpoint(path.parent)
    return [checkpoint.tensor(name, None).sum() for name in ("a",)]


COLUMNS = {"a": Column("int", "a"), "b": Column("float", "b"), "c": Column("str", "c"), "d": Column("bool", "d")}
TABLE = Table("nothing", COLUMNS, ("a",))


def write_results(folder: Path, rows: int) -> None:
    with ResultWriter(folder, {"x": [1]}, TABLE, resume=True) as writer:
        for a in range(rows):
            writer.write({"a": a, "b": a / 3, "c": "c", "d": True})


def results_file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_results(folder / "out", 3)
        return folder / "out" / name

    return make


def read_results(path: Path) -> object:
    outcomes: list[object] = []
    for work in (read_rows, redraw, lambda out: write_results(out, 4)):
        try:
            outcomes.append(work(path.parent))
        except SpecmdError as error:
            outcomes.append(error)
    for outcome in outcomes:
        if isinstance(outcome, SpecmdError):
            raise outcome
    return outcomes


IDS = [[[0, 1], [2, 3]], [[1, 2], [0, 3]]]  # [T][L][K]
SIZES: dict[str, Any] = {"experts": 4, "expert_bytes": 100}
BIGMOE = (
    "# route_trace v1\n# model=/m/tiny.gguf arch=qwen3moe n_layer=2 n_expert=4 n_expert_used=2\n"
    "# layer=0 expert_bytes=100 dense_bytes=10\n# layer=1 expert_bytes=100 dense_bytes=10\n"
    "turn,phase,step,layer,slot,expert,weight,residency\n"
    + "".join(
        f"0,{t > 0:d},{t},{layer},{k},{IDS[t][layer][k]},0.5,0\n" for t in (0, 1) for layer in (0, 1) for k in (0, 1)
    )
)
ROWS = [
    {"request_id": "r", "phase": "decode", "token_position": t, "layer_id": layer, "expert_ids": IDS[t][layer]}
    for t in (0, 1)
    for layer in (0, 1)
]
CELL = {"selected_experts": [0, 1, 2, 3], "selected_probs": [0.4, 0.3, 0.2, 0.1]}
EXAMPLE = {"router_data": [{f"token_{t}": {f"layer_{layer}": CELL for layer in range(24)}} for t in (5, 6)]}
SGLANG = {
    "records": [
        {"forward_mode": 1, "topk_ids_of_layer": [[[0, 1], [1, 2]], [[2, 3], [0, 3]]], "positions": [0, 1]},
        {"forward_mode": 2, "topk_ids_of_layer": [[[0, 1]], [[2, 3]]], "positions": [2]},
    ],
    "last_physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2, 3]],
}


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def importing(name: str, **sizes: Any) -> Callable[[Path], object]:
    return lambda path: import_trace(path, name, **sizes)


READERS: dict[str, Reader] = {
    "trace": Reader(trace_file, load_trace),
    "streamed trace": Reader(trace_file, lambda path: list(stretches(open_trace(path)))),
    "profile": Reader(text_file("p.json", {"counts": [[1, 2], [3, 4]], "requests": ["a"]}), load_profile),
    "profile, npz": Reader(arrays_file(counts=np.ones((2, 4)), source="s"), load_profile),
    "trained": Reader(arrays_file(head=np.array("evictor"), x=np.ones(3)), lambda path: load("evictor", f"{path}")),
    "hardware": Reader(hardware_file, load_hardware),
    "tensors": Reader(tensors_file, read_tensors),
    "index": Reader(index_file, read_tensors),
    "manifest": Reader(results_file("manifest.json"), read_results),
    "rows": Reader(results_file("rows.csv"), read_results),
    "bigmoe": Reader(text_file("t.csv", BIGMOE), importing("bigmoe-csv")),
    "fingerprint": Reader(text_file("x_examples.json", [EXAMPLE]), importing("gpt-oss-fingerprint")),
    "fingerprint, npz": Reader(
        arrays_file(
            expert_ids=np.tile(np.arange(4, dtype=np.uint8), (2, 24, 1)), gate_u8=np.full((2, 24, 4), 64, np.uint8),
            lengths=np.array([2]), meta="[{}]",
        ),
        importing("gpt-oss-fingerprint"),
    ),
    "vllm": Reader(
        text_file("v.jsonl", lines([{"choices": [{"routed_experts": IDS}], "prompt_routed_experts": IDS}])),
        importing("vllm", **SIZES),
    ),
    "vllm, npz": Reader(arrays_file(routed_experts=np.array(IDS)), importing("vllm", **SIZES)),
    "sglang": Reader(text_file("s.json", SGLANG), importing("sglang", **SIZES)),
    "moe-sim": Reader(text_file("m.jsonl", lines(ROWS)), importing("moe-sim", **SIZES)),
    "policylang": Reader(
        text_file("m.jsonl", lines([{"p": 0, "t": 0, "l": layer, "e": [0, 1]} for layer in (0, 1)])),
        importing("moe-policylang", **SIZES),
    ),
    "imp": Reader(
        text_file("i.json", {"top_k": 2, "moe_expert_trace": [0, 1, 2, 1, 2, 3]}), importing("imp-json", **SIZES)
    ),
}  # fmt: skip
for family in FAMILIES:
    READERS[f"config, {family}"] = Reader(
        text_file("config.json", tiny_hf(family)), lambda path: load_config(path.parent)
    )
    READERS[f"model, {family}"] = Reader(text_file("config.json", tiny_hf(family)), lambda path: model(str(path)))


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Changes a file: its JSON, if it is some, or its bytes."""
    if draw.random() < 0.75:
        whole = data.split(b"\n") if data.count(b"\n") > 1 else [data]
        at = draw.randrange(len(whole))
        try:
            tree = json.loads(whole[at])
        except ValueError:
            pass
        else:
            whole[at] = mutated_json(tree, draw)
            return b"\n".join(whole)
    spoilt = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(spoilt) + 1)
        match draw.randrange(5):
            case 0 if spoilt:
                spoilt[at % len(spoilt)] ^= 1 << draw.randrange(8)
            case 1:
                del spoilt[at:]
            case 2:
                spoilt[at:at] = spoilt[at : at + draw.randrange(1, 64)]
            case 3:
                spoilt[at:at] = draw.choice((b"9" * 30, b"-", b"\xff", b"\0", b"\n", b",", b"9" * 6000))
            case _:
                del spoilt[at : at + draw.randrange(1, 16)]
    return bytes(spoilt)


def mutated_json(tree: Any, draw: random.Random) -> bytes:
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 3))):
        places: list[tuple[Any, Any]] = []
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, value in items:
                places.append((node, key))
                waiting.append(value)
        if not places:
            return json.dumps(draw.choice(NASTY)).encode()
        node, key = draw.choice(places)
        if draw.random() < 0.15:
            del node[key]
        else:
            node[key] = copy.deepcopy(draw.choice(NASTY))
    text = json.dumps(tree)
    if draw.random() < 0.05:
        text = text.replace("null", draw.choice(("[" * 100_000, "1" * 5000, "1e999")), 1)
    return text.encode()


@pytest.mark.parametrize("name", READERS)
def test_a_reader_gives_a_value_or_one_line(tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    path = reader.make(tmp_path)
    whole = path.read_bytes()
    others = {other: other.read_bytes() for other in path.parent.rglob("*") if other.is_file()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(st.integers(0, 2**32 - 1))
    def ask(seed: int) -> None:
        for other, content in others.items():
            other.write_bytes(content)
        path.write_bytes(damaged(whole, random.Random(seed)))
        began = time.perf_counter()
        try:
            reader.read(path)
        except SpecmdError as error:
            message = str(error)
            assert message.isprintable() and len(message) <= MOST_MESSAGE, message
        assert time.perf_counter() - began < MOST_SECONDS

    try:
        reader.read(path)
    except SpecmdError as error:  # not all are whole: a study that draws nothing, weights that lack
        assert name in ("manifest", "rows", "trained"), error
    ask()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB


def test_base64_of_an_array_is_checked(tmp_path: Path) -> None:
    import base64

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array(IDS))
    data = bytearray(buffer.getvalue())
    draw = random.Random(0)
    for _ in range(EXAMPLES):
        spoilt = bytearray(data)
        spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
        record = {"routed_experts": base64.b64encode(spoilt).decode(), "usage": {"prompt_tokens": 1}}
        (tmp_path / "v.jsonl").write_text(lines([record]))
        try:
            import_trace(tmp_path / "v.jsonl", "vllm", **SIZES)
        except SpecmdError as error:
            assert str(error).isprintable()
