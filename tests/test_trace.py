"""The trace file: what is written comes back, and what is broken is named."""

from __future__ import annotations

import dataclasses
import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.files import file_sha256
from specmd_jax.trace import (
    BUNDLED,
    as_trace,
    bundled,
    first_tokens,
    load_trace,
    save_trace,
    select_requests,
    synthesize,
    validate,
)
from specmd_jax.trace.stream import open_trace
from specmd_jax.types import Trace


def small(**changes: Any) -> Trace:
    """Two requests of 3 and 2 tokens (2 and 0 of them prompt), 2 layers of 4 experts, top-2."""
    ids = [[[0, 1], [2, 3]], [[1, 0], [-1, -1]], [[3, 2], [1, 2]], [[0, 2], [3, 0]], [[1, 3], [0, 1]]]
    trace = Trace(
        expert_ids=np.array(ids, np.int16),
        lengths=np.array([3, 2], np.int32),
        prompt_lengths=np.array([2, 0], np.int32),
        experts=4,
        expert_bytes=np.array([100, 200]),
        gates=np.linspace(0.1, 0.9, 20, dtype=np.float32).reshape(5, 2, 2),
        meta={"model": "m", "source": "s", "licence": "l", "capture": "c", "requests": [{"a": 1}, {"b": [2.5, None]}]},
    )
    return dataclasses.replace(trace, **changes)


def assert_same(one: Trace, other: Trace) -> None:
    for field in dataclasses.fields(Trace):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


def arrays_of(trace: Trace, path: Path) -> dict[str, Any]:
    save_trace(trace, path, overwrite=True)
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


# ------------------------------------------------------------------------------------------------ round trips


def test_round_trip(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).normal(size=(5, 2, 4))
    trace = small(logits=wide.astype(np.float32), ahead=wide.astype(np.float16))
    save_trace(trace, tmp_path / "t.npz")
    again = load_trace(tmp_path / "t.npz")
    assert_same(trace, again)
    assert again.logits is not None and again.logits.dtype == np.float32
    assert again.ahead is not None and again.ahead.dtype == np.float16


def test_unequal_and_equal_expert_bytes(tmp_path: Path) -> None:
    meta = json.loads(str(arrays_of(small(), tmp_path / "t.npz")["meta"]))
    assert meta["expert_bytes"] == [100, 200]
    meta = json.loads(str(arrays_of(small(expert_bytes=np.array([7, 7])), tmp_path / "t.npz")["meta"]))
    assert meta["expert_bytes"] == 7
    assert load_trace(tmp_path / "t.npz").expert_bytes.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("ids", "experts", "dtype"),
    [(0, 4, np.uint8), (-1, 4, np.int16), (255, 256, np.uint8), (256, 300, np.int16), (40_000, 50_000, np.int32)],
)
def test_ids_take_the_smallest_type(tmp_path: Path, ids: int, experts: int, dtype: type) -> None:
    array = small().expert_ids.astype(np.int64)
    array[array < 0] = 3
    array[1, 1, 1] = 2
    array[0, 0, 0] = ids
    stored = arrays_of(small(expert_ids=array, experts=experts), tmp_path / "t.npz")["expert_ids"]
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, array)


@pytest.mark.parametrize(
    ("gates", "dtype"),
    [
        (np.arange(20) * 13 / np.float32(255), np.uint8),
        (np.arange(20) / 64, np.float16),
        (np.arange(20) / 7, np.float32),
        (np.full(20, 1e9), np.float32),
        (np.full(20, 3.0), np.float16),
    ],
)
def test_gates_take_the_smallest_type_that_loses_nothing(tmp_path: Path, gates: Any, dtype: type) -> None:
    trace = small(gates=np.asarray(gates, np.float32).reshape(5, 2, 2))
    assert arrays_of(trace, tmp_path / "t.npz")["gates"].dtype == dtype
    assert_same(trace, load_trace(tmp_path / "t.npz"))


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        save_trace(small(), tmp_path / name)
    assert file_sha256(tmp_path / "a.npz") == file_sha256(tmp_path / "b.npz")
    save_trace(small(expert_bytes=np.array([100, 201])), tmp_path / "c.npz")
    assert file_sha256(tmp_path / "c.npz") != file_sha256(tmp_path / "a.npz")


def test_refuses_to_overwrite_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    save_trace(small(), path)
    before = path.read_bytes()
    with pytest.raises(SpecmdError, match=r"t\.npz: already exists"):
        save_trace(small(experts=5), path)
    with pytest.raises(SpecmdError, match="meta is not JSON"):
        save_trace(small(meta={"x": {1, 2}}), path, overwrite=True)
    with pytest.raises(SpecmdError, match="expected at least 1"):
        save_trace(small(lengths=np.array([5, 0])), path, overwrite=True)
    assert path.read_bytes() == before
    with pytest.raises(SpecmdError, match="cannot write"):
        save_trace(small(), tmp_path / "no" / "t.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_optional_arrays_may_be_absent(tmp_path: Path) -> None:
    arrays = arrays_of(small(gates=None), tmp_path / "t.npz")
    del arrays["prompt_lengths"]
    np.savez(tmp_path / "t.npz", **arrays)
    trace = load_trace(tmp_path / "t.npz")
    assert trace.prompt_lengths.tolist() == [0, 0]
    assert trace.gates is None and trace.logits is None and trace.ahead is None


# --------------------------------------------------------------------------------------------------- bad input


def bad_cell(token: int, layer: int, slot: int, value: float, field: str = "expert_ids") -> dict[str, Any]:
    array = np.array(getattr(small(), field))
    array[token, layer, slot] = value
    return {field: array}


WIDE = np.zeros((5, 2, 4), np.float32)
NAN = np.where(np.arange(40).reshape(5, 2, 4) == 35, np.nan, WIDE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (bad_cell(4, 1, 0, 4), "T: request 1, token 1, layer 1: expert id is 4, expected 0 to 3, or -1 for none"),
        (bad_cell(2, 0, 1, -2), "T: request 0, token 2, layer 0: expert id is -2, expected 0 to 3, or -1 for none"),
        (bad_cell(3, 0, 1, 0), "T: request 1, token 0, layer 0: expert 0 appears twice, expected distinct experts"),
        (bad_cell(1, 0, 0, np.nan, "gates"), "T: request 0, token 1, layer 0: gate is nan, expected a finite number"),
        (bad_cell(1, 1, 0, -0.5, "gates"), "T: request 0, token 1, layer 1: gate is -0.5, expected a finite number"),
        ({"logits": NAN}, "T: request 1, token 1, layer 0: logits of expert 3 is NaN"),
        ({"ahead": NAN}, "T: request 1, token 1, layer 0: ahead of expert 3 is NaN"),
        ({"logits": WIDE[:, :, :3]}, "T: logits has shape [5, 2, 3], expected [5, 2, 4]"),
        ({"ahead": WIDE.astype(np.int8)}, "T: ahead has dtype int8, expected floats"),
        ({"gates": WIDE}, "T: gates has shape [5, 2, 4], expected [5, 2, 2]"),
        ({"lengths": np.array([3, 3])}, "T: lengths sum to 6, expected 5 (the tokens of expert_ids)"),
        ({"lengths": np.array([5, 0])}, "T: request 1: length is 0, expected at least 1"),
        ({"lengths": np.array([], int), "prompt_lengths": np.array([], int)}, "T: lengths is empty"),
        ({"prompt_lengths": np.array([0, 3])}, "T: request 1: prompt_length is 3, expected 0 to its length 2"),
        ({"prompt_lengths": np.array([0])}, "T: prompt_lengths has 1 entries, expected 2"),
        ({"expert_bytes": np.array([5, 0])}, "T: expert_bytes of layer 1 is 0, expected an integer >= 1"),
        ({"expert_bytes": np.array([5])}, "T: expert_bytes is int64 of shape [1], expected 2 integers"),
        ({"expert_ids": np.zeros((5, 2), np.uint8)}, "T: expert_ids has shape [5, 2], expected 3 dimensions"),
        ({"expert_ids": [[[0, 1]]]}, "T: expert_ids is of type list, expected a numpy array"),
        ({"expert_ids": None}, "T: expert_ids is of type NoneType, expected a numpy array"),
        ({"lengths": [3, 2]}, "T: lengths is of type list, expected a numpy array"),
        ({"gates": [0.5]}, "T: gates is of type list, expected a numpy array"),
        ({"expert_bytes": 100}, "T: expert_bytes is of type int, expected a numpy array"),
        ({"experts": 4.0}, "T: experts is 4.0, expected an integer"),
        ({"experts": True}, "T: experts is True, expected an integer"),
        ({"meta": None}, "T: meta is of type NoneType, expected a dict"),
        ({"expert_ids": np.zeros((5, 2, 2))}, "T: expert_ids has dtype float64, expected integers"),
        ({"experts": 1}, "T: top_k is 2 with 1 experts, expected no more"),
        ({"meta": {"requests": [{}]}}, "T: meta key 'requests' has 1 rows, expected a list of 2 rows"),
        ({"meta": {"requests": [{}, 3]}}, "T: meta row of request 1 is 3, expected an object"),
    ],
)
def test_validate_names_the_bad_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        validate(small(**changes), "T")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_validate_reports_the_first_bad_token_of_a_long_trace() -> None:
    trace = synthesize(layers=1, experts=8, top_k=2, tokens=35_000, requests=4, stickiness=0)
    ids = trace.expert_ids.copy()
    ids[70_004, 0, 1] = ids[139_999, 0, 0] = 9
    with pytest.raises(SpecmdError, match="request 2, token 4, layer 0: expert id is 9"):
        validate(dataclasses.replace(trace, expert_ids=ids))


def test_ids_that_count_from_1_are_found_wherever_the_last_expert_is() -> None:
    ids = np.zeros((3, 4, 2), np.int32)
    ids[..., 1] = 1
    ids[:, :3] += 1  # all layers but the last
    ids[2, 1] = (3, 4)
    trace = Trace(ids, np.array([3]), np.array([1]), experts=4, expert_bytes=np.full(4, 9))
    with pytest.raises(SpecmdError) as caught:
        as_trace(trace)
    assert str(caught.value) == (
        "trace: request 0, token 2, layer 1: expert id is 4, expected 0 to 3, or -1 for none; ids count from 0"
    )


def test_minus_infinity_is_a_masked_expert() -> None:
    validate(small(logits=np.where(WIDE == 0, -np.inf, WIDE)))


def with_meta(**changes: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "format": 1,
        "model": "m",
        "layers": 2,
        "experts": 4,
        "top_k": 2,
        "expert_bytes": [100, 200],
    }
    meta |= {"source": "s", "licence": "l", "capture": "c", "requests": [{}, {}]}
    meta |= changes
    return {"meta": np.array(json.dumps({key: value for key, value in meta.items() if value is not ...}))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": None}, "array 'lengths' is missing (found: expert_ids, gates, meta, prompt_lengths)"),
        ({"meta": None}, "array 'meta' is missing"),
        ({"gate": np.zeros(3)}, "unknown array in FILE 'gate'; did you mean 'gates'?"),
        ({"lengths": np.array([[3, 2]])}, "lengths has shape [1, 2], expected 1 dimension"),
        ({"lengths": np.array([3.0, 2.0])}, "lengths has dtype float64, expected integers"),
        ({"lengths": np.array([3, 1 << 40])}, "request 1: lengths is 1099511627776, expected 0 to 2^31 - 1"),
        ({"gates": np.zeros((5, 2, 2))}, "gates has dtype float64, expected uint8, float16 or float32"),
        ({"expert_ids": np.array([{}, {}])}, "array 'expert_ids' holds a pickled object, expected plain numbers"),
        ({"meta": np.array("{")}, "meta: Expecting property name"),
        ({"meta": np.array("[1]")}, "meta is a JSON list, expected an object"),
        ({"meta": np.array(3)}, "meta is int64 of shape [], expected one JSON string"),
        (with_meta(format=2), "meta key 'format' is 2, expected 1"),
        (with_meta(model=...), "meta key 'model' is missing"),
        (with_meta(requests=...), "meta key 'requests' is missing"),
        (with_meta(model=3), "meta key 'model' is 3, expected a string"),
        (with_meta(layers=3), "expert_ids has shape [5, 2, 2], expected [tokens, 3, 2] (layers and top_k of its meta)"),
        (with_meta(experts="4"), "meta key 'experts' is '4', expected an integer >= 1"),
        (with_meta(experts=3), "request 0, token 0, layer 1: expert id is 3, expected 0 to 2"),
        (with_meta(expert_bytes=[100]), "'expert_bytes' has 1 entries, expected 2, one per layer"),
        (with_meta(expert_bytes=[100, 0]), "expert_bytes of layer 1 is 0, expected an integer >= 1"),
        (with_meta(expert_bytes=1.5), "expert_bytes of layer 0 is 1.5, expected an integer >= 1"),
    ],
)
def test_load_names_the_bad_place(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.npz"
    arrays = arrays_of(small(), path) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(SpecmdError) as caught:
        load_trace(path)
    text = str(caught.value)
    assert message.replace("FILE", str(path)) in text
    assert str(path) in text and "\n" not in text


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    save_trace(small(), path)
    whole = path.read_bytes()
    cases: dict[str, tuple[bytes, str]] = {
        "cut.npz": (whole[: len(whole) // 2], "truncated zip"),
        "text.npz": (b"hello", "not a zip"),
        "empty.npz": (b"", "not a zip"),
        "flipped.npz": (whole[:60] + bytes([whole[60] ^ 0xFF]) + whole[61:], "damaged file: cannot read 'expert_ids'"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SpecmdError) as caught:
            load_trace(tmp_path / name)
        assert f"{name}: {message}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SpecmdError, match=r"gone\.npz: no such file"):
        load_trace(tmp_path / "gone.npz")
    with pytest.raises(SpecmdError, match="not a file"):
        load_trace(tmp_path)
    with pytest.raises(SpecmdError, match="cannot read"):
        file_sha256(tmp_path / "gone.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(SpecmdError, match=r"'expert_ids' is missing \(found: readme.txt\)"):
        load_trace(tmp_path / "other.npz")


def test_every_flipped_byte_loads_the_same_or_fails_cleanly(tmp_path: Path) -> None:
    trace = small()
    path = tmp_path / "t.npz"
    save_trace(trace, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            again = load_trace(path)
        except SpecmdError as error:
            assert "\n" not in str(error)
        else:
            assert_same(trace, again)


# ----------------------------------------------------------------------------------------------------- slicing


def test_select_requests() -> None:
    trace = small(logits=np.arange(40, dtype=np.float32).reshape(5, 2, 4))
    picked = select_requests(trace, [1, 0, 1])
    rows = [3, 4, 0, 1, 2, 3, 4]
    np.testing.assert_array_equal(picked.expert_ids, trace.expert_ids[rows])
    assert trace.gates is not None and picked.gates is not None and trace.logits is not None
    np.testing.assert_array_equal(picked.gates, trace.gates[rows])
    np.testing.assert_array_equal(picked.logits, trace.logits[rows])
    assert picked.lengths.tolist() == [2, 3, 2] and picked.prompt_lengths.tolist() == [0, 2, 0]
    assert [list(row) for row in picked.meta["requests"]] == [["b"], ["a"], ["b"]]
    assert len(trace.meta["requests"]) == 2
    validate(picked)
    for bad in ([2], [-1], [], [0.5]):
        with pytest.raises(SpecmdError, match="select"):
            select_requests(trace, bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("n", "lengths", "prompts"), [(1, [1], [1]), (3, [3], [2]), (4, [3, 1], [2, 0]), (5, [3, 2], [2, 0])]
)
def test_first_tokens(n: int, lengths: list[int], prompts: list[int]) -> None:
    cut = first_tokens(small(), n)
    validate(cut)
    np.testing.assert_array_equal(cut.expert_ids, small().expert_ids[:n])
    assert cut.lengths.tolist() == lengths and cut.prompt_lengths.tolist() == prompts
    with pytest.raises(SpecmdError, match="expected at least 1"):
        first_tokens(small(), 0)


# ----------------------------------------------------------------------------------------------------- bundled


@pytest.mark.parametrize(
    ("name", "model", "shape"),
    [
        ("gpt-oss-20b", "gpt-oss-20b", (24, 32, 4)),
        ("bigmoe-qwen3-30b-a3b", "Qwen3-30B-A3B", (48, 128, 6)),
        ("bigmoe-gpt-oss-120b", "gpt-oss-120b", (36, 128, 2)),
        ("specmd-reference", "specmd-reference", (8, 32, 4)),
    ],
)
def test_bundled(name: str, model: str, shape: tuple[int, int, int]) -> None:
    trace = bundled(name)
    assert (trace.model, trace.layers, trace.experts, trace.top_k) == (model, *shape)
    assert trace.meta["licence"] == "Apache-2.0"
    assert trace.gates is not None and abs(float(trace.gates[0, 0].sum()) - 1) < 0.01


def test_the_bundled_reference_trace_has_prompts_logits_and_scores_of_every_domain() -> None:
    trace = bundled("specmd-reference")
    assert trace.logits is not None and trace.ahead is not None
    assert (trace.requests, trace.tokens, set(trace.prompt_lengths.tolist())) == (10, 850, {24})
    domains = {row["dataset"] for row in trace.meta["requests"]}
    assert domains == {"prose", "chinese", "code", "maths", "dialogue"}
    best = trace.logits.astype(np.float32).argmax(-1)
    assert (best == trace.expert_ids[..., 0]).mean() > 0.98  # but for ties of rounded logits
    foretold = trace.ahead[:, :-1].astype(np.float32).argmax(-1)
    assert 0.3 < (foretold == trace.expert_ids[:, 1:, 0]).mean() < 1


def test_bundled_table_and_size() -> None:
    folder = Path(__file__).parents[1] / "specmd_jax" / "trace" / "data"
    assert sorted(BUNDLED.values()) == sorted(p.name for p in folder.glob("*.npz"))
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 6_000_000
    with pytest.raises(SpecmdError, match="did you mean 'gpt-oss-20b'"):
        bundled("gpt-oss-20")


def test_bundled_gpt_oss_20b_begins_as_its_source() -> None:
    """The first requests that make up 8,000 tokens are the source's first ones, then it is spread over the datasets."""
    trace = bundled()
    index = [row["index"] for row in trace.meta["requests"]]
    head = int(np.searchsorted(np.cumsum(trace.lengths), 8000)) + 1
    assert index[:head] == list(range(head)) and index == sorted(set(index))
    assert len({row["dataset"] for row in trace.meta["requests"]}) == 8
    assert trace.expert_bytes.tolist() == [13_236_480] * 24


# ------------------------------------------------------------------------------------------------------ the door


def test_the_door_takes_a_trace_a_name_in_any_case_and_a_path(tmp_path: Path) -> None:
    trace = small()
    assert as_trace(trace) is trace
    save_trace(trace, tmp_path / "t.npz")
    assert_same(as_trace(tmp_path / "t.npz"), trace)
    assert_same(as_trace(str(tmp_path / "t.npz")), trace)
    assert_same(as_trace("BigMoE-Qwen3-30B-A3B"), bundled("bigmoe-qwen3-30b-a3b"))
    opened = open_trace(tmp_path / "t.npz")
    assert as_trace(opened) is opened


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "trace is None, expected a Trace, an opened trace file, the name of a bundled trace or a path"),
        ([1, 2], "trace is of type list, expected a Trace"),
        ({"expert_ids": 1}, "trace is of type dict, expected a Trace"),
        (np.zeros((2, 2, 2), int), "trace is of type ndarray, expected a Trace"),
        (3, "trace is of type int, expected a Trace"),
        ("gpt-oss-20", "unknown trace 'gpt-oss-20'; did you mean 'gpt-oss-20b'?"),
        ("", "unknown trace ''"),
        ("gone.npz", "gone.npz: no such file"),
        (Path("gpt-oss-20b"), "gpt-oss-20b: no such file"),
        (Path("."), ".: not a file, expected a trace file (.npz)"),
    ],
)
def test_the_door_refuses_anything_else_in_one_line(source: Any, message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        as_trace(source)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        bad_cell(4, 1, 0, 4),
        bad_cell(3, 0, 1, 0),
        bad_cell(1, 0, 0, np.nan, "gates"),
        {"expert_ids": np.zeros((5, 2), int)},
        {"expert_ids": np.zeros((5, 2, 2))},
        {"expert_ids": None},
        {"lengths": np.array([3, 3])},
        {"lengths": [3, 2]},
        {"prompt_lengths": np.array([9, 0])},
        {"logits": WIDE[:4]},
        {"ahead": NAN},
        {"expert_bytes": np.array([100])},
        {"experts": 3},
        {"meta": []},
    ],
)
def test_the_door_checks_an_object_as_a_file_is_checked(changes: dict[str, Any]) -> None:
    trace = small(**changes)
    with pytest.raises(SpecmdError) as expected:
        validate(trace)
    for _ in range(2):  # a verdict of "bad" is not taken for one of "good"
        with pytest.raises(SpecmdError) as caught:
            as_trace(trace)
        assert str(caught.value) == str(expected.value)


def test_an_object_is_checked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trace, read = small(), tmp_path / "t.npz"
    save_trace(trace, read)  # checks it
    loaded, fresh = load_trace(read), small()
    as_trace(fresh)
    checked = []
    module = importlib.import_module("specmd_jax.trace.validate")  # the package has a function of this name
    monkeypatch.setattr(module, "validate_cells", lambda trace, place: checked.append(trace))
    for known in (trace, loaded, fresh):
        as_trace(known)
    assert checked == []
    changed = dataclasses.replace(fresh, gates=None)
    as_trace(changed)
    as_trace(changed)
    assert len(checked) == 1 and checked[0] is changed


# ----------------------------------------------------------------------------------------------------- as shown


def test_a_trace_shows_itself_on_one_line() -> None:
    assert repr(small()) == "Trace(m: 5 tokens, 2 requests, 2 layers x 4 experts top-2, gates)"
    plain = small(gates=None, meta={})
    assert repr(plain) == "Trace(unknown: 5 tokens, 2 requests, 2 layers x 4 experts top-2, ids only)"
    assert repr(small(logits=WIDE, ahead=WIDE)).endswith("top-2, gates and logits and ahead)")
    assert repr(small(expert_ids=None)) == "Trace(invalid: see specmd_jax.trace.validate)"


def test_the_first_tokens_of_a_bundled_trace() -> None:
    assert_same(bundled("bigmoe-gpt-oss-120b", 7), first_tokens(bundled("bigmoe-gpt-oss-120b"), 7))
    with pytest.raises(SpecmdError, match="tokens to keep is 0, expected at least 1"):
        bundled("bigmoe-gpt-oss-120b", 0)
