"""What recordings get wrong: each kind has its right answer, for all formats alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.export_trace import main as export_main
from experiments.import_trace import main as import_main
from specmd_jax.api import run
from specmd_jax.errors import SpecmdError
from specmd_jax.trace import STRIPPABLE, import_trace, load_trace
from specmd_jax.trace.importers.meaning import Known, examined, strip_kinds
from specmd_jax.trace.profile import load_profile
from specmd_jax.types import Trace

CASES = Path(__file__).parent / "data" / "cases"
SIZES: dict[str, Any] = {"experts": 8, "expert_bytes": 100}


def case(number: int, **options: Any) -> Trace:
    (path,) = CASES.glob(f"{number:02}_*")
    return import_trace(path, **(SIZES | options))


def warnings_of(trace: Trace) -> list[str]:
    return trace.meta.get("warnings", [])


def refusal(number: int, **options: Any) -> str:
    with pytest.raises(SpecmdError) as caught:
        case(number, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shape(trace: Trace) -> tuple[int, int, int, int]:
    prompt = int(trace.prompt_lengths.sum())
    return prompt, trace.tokens - prompt, trace.layers, trace.top_k


# ----------------------------------------------------------------------------------------------------- the cases


def test_the_last_token_has_no_row() -> None:
    trace = case(1)
    assert shape(trace) == (4, 2, 3, 2) and warnings_of(trace) == []


def test_a_last_row_of_zeros_is_refused_or_dropped() -> None:
    assert "request 0, token 6: the same expert 2 times in every layer: padding, no routing (1 of 7" in refusal(2)
    trace = case(2, strip="padding")
    np.testing.assert_array_equal(trace.expert_ids, case(1).expert_ids)
    assert shape(trace) == (4, 2, 3, 2) and "taken out" in warnings_of(trace)[0]


def test_minus_one_in_uint8() -> None:
    trace = case(4, experts=256)
    assert (trace.expert_ids[0] == -1).all() and (trace.expert_ids[1:] >= 0).all()
    assert warnings_of(trace)[0].startswith("3 of 18 cells: 255")


def test_one_255_beside_others_is_an_expert() -> None:
    ids = np.array([[[255, 3], [255, 255]], [[0, 255], [4, 5]]])
    assert examined(made(ids, experts=256), "x").expert_ids.tolist() == [
        [[255, 3], [-1, -1]],
        [[0, 255], [4, 5]],
    ]
    assert examined(made(ids, experts=64), "x").expert_ids.tolist() == [[[-1, 3], [-1, -1]], [[0, -1], [4, 5]]]


def test_rows_of_nan() -> None:
    trace = case(6)
    assert shape(trace) == (4, 5, 3, 2)
    assert warnings_of(trace) == [
        "4 of 9 tokens: experts 0 to 1 in all layers, as of a router that saw NaN; strip 'nan' takes them out"
    ]
    assert shape(case(6, strip=["nan"])) == (4, 1, 3, 2)


def test_a_fused_shared_expert() -> None:
    assert "column 3 of 3 is expert 8 of 8 in every row: a fused shared expert" in refusal(7)
    trace = case(7, strip="shared")
    assert shape(trace) == (4, 2, 3, 2) and trace.meta["shared_experts"] == 1
    assert warnings_of(trace) == ["a fused shared expert (id 8, column 3) was taken out: it counts as dense"]
    known = case(7, experts=9)  # as if it were routed
    assert "the last column is expert 8 in every row: if that is a fused shared expert" in warnings_of(known)[0]


def test_sglang_bare_numbers() -> None:
    assert shape(case(9, top_k=2)) == (4, 2, 3, 2)
    assert "does not say top_k" in refusal(9)


def test_a_captured_graph() -> None:
    trace = case(12)
    assert shape(trace) == (4, 7, 3, 2)  # of 8 decoded tokens the last has no row
    assert warnings_of(trace)[0].startswith("7 of 11 tokens: decoded with the experts of their neighbours")
    assert shape(case(12, strip="repeats")) == (4, 1, 3, 2)


# ------------------------------------------------------------------------------------------------- kinds without one


def made(ids: Any, prompt: int = 0, experts: int = 8, **rest: Any) -> Trace:
    ids = np.asarray(ids)
    return Trace(
        expert_ids=ids,
        lengths=np.array([len(ids)], np.int32),
        prompt_lengths=np.array([prompt], np.int32),
        experts=experts,
        expert_bytes=np.full(ids.shape[1], 100, np.int64),
        meta={"requests": [{}]},
        **rest,
    )


def drawn(tokens: int, layers: int = 3, experts: int = 8, k: int = 2) -> np.ndarray:
    return np.random.default_rng(7).permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)[..., :k]


def test_a_sound_recording_has_no_warning() -> None:
    assert "warnings" not in examined(made(drawn(40), prompt=9), "x").meta


def test_ids_read_as_int8() -> None:
    ids = drawn(5, experts=256).astype(np.uint8)
    ids[2, 1] = 200, 3
    with pytest.raises(SpecmdError, match=r"x: request 0, token \d, layer \d: .* is -\d+, an id above 127 that was"):
        examined(made(ids.view(np.int8).astype(np.int64), experts=256), "x")


def test_a_prompt_of_zeros() -> None:
    ids = drawn(9)
    ids[:4] = 0
    with pytest.raises(SpecmdError, match=r"request 0, token 0: .* padding, no routing \(4 of 9 tokens\)"):
        examined(made(ids, prompt=4), "x")
    assert examined(made(ids, prompt=4), "x", ["padding"]).prompt_lengths.tolist() == [0]
    with pytest.raises(SpecmdError, match="every expert id is 0: the engine recorded nothing"):
        examined(made(ids[:4]), "x")


def test_dense_layers_and_unused_places_are_left_out() -> None:
    ids = np.full((6, 5, 4), -1)
    ids[:, 2:4, :2] = drawn(6, 2)
    ids[:, 0] = 0
    gates = np.random.default_rng(0).random(ids.shape).astype(np.float32)
    trace = examined(made(ids, prompt=2, gates=gates), "x")
    np.testing.assert_array_equal(trace.expert_ids, ids[:, 2:4, :2])
    np.testing.assert_array_equal(trace.gates, gates[:, 2:4, :2])
    assert trace.meta["layer_numbers"] == [2, 3] and trace.expert_bytes.tolist() == [100, 100]
    assert trace.meta["warnings"] == ["layers 0, 1, 4 without routed experts, taken for dense and left out"]


def test_profiling_rows() -> None:
    ids = drawn(30)
    ids[:20] = ids[0]
    trace = examined(made(ids, prompt=25), "x")
    assert trace.meta["warnings"][0].startswith("20 of 30 tokens: alike in front of everything")
    left = examined(made(ids, prompt=25), "x", ["profiling"])
    assert (left.tokens, left.prompt_lengths.tolist()) == (10, [5])


def test_a_prompt_that_is_one_tokens_ranking() -> None:
    ids = drawn(40, layers=8, experts=32, k=4)
    ids[:8] = drawn(1, 8, 32, 32).reshape(8, 8, 4).swapaxes(0, 1)
    with pytest.raises(SpecmdError, match=r"a prompt of one token's whole ranking, .* \(12 of 40 tokens\)"):
        examined(made(ids, prompt=12, experts=32), "x")
    assert examined(made(ids, prompt=12, experts=32), "x", ["ranking"]).tokens == 28


def test_what_the_file_does_not_have_is_said() -> None:
    known = Known(token_breaks=False, interleaved=True, notes=("a note",))
    notes = examined(made(drawn(9)), "x", known=known).meta["warnings"]
    assert notes[0] == "a note" and [any(word in note for note in notes) for word in
        ("no prompt tokens", "where a token ends", "requests alternate")] == [True] * 3  # fmt: skip
    (note,) = examined(made(drawn(9)), "x", known=Known(phases=False)).meta["warnings"]
    assert note.startswith("prompt tokens are not told from decoded ones")


def test_taking_out_everything_is_refused() -> None:
    ids = np.tile(drawn(1), (12, 1, 1))
    with pytest.raises(SpecmdError, match="nothing is left without what was to be taken out"):
        examined(made(ids, prompt=12), "x", ["profiling"])


def test_names_to_strip() -> None:
    assert strip_kinds("all") == frozenset(STRIPPABLE) and strip_kinds("") == frozenset()
    assert strip_kinds("NaN, padding") == {"nan", "padding"}
    with pytest.raises(SpecmdError, match="unknown kind to strip 'nans'; did you mean 'nan'"):
        strip_kinds("nans")


def test_a_prompt_wider_than_the_cache_copies_each_expert_once() -> None:
    prompt = np.array([[0, 1], [2, 3], [0, 1], [2, 3], [4, 5], [6, 7], [4, 5], [6, 7]])[:, None]
    found = run(examined(made(prompt, prompt=8), "x"), capacity=2 * 100, hardware=None)
    assert (found.loads, found.demand) == (8, 8)


# ----------------------------------------------------------------------------------------------------- the command


def command(monkeypatch: pytest.MonkeyPatch, main: Any, *arguments: Any) -> None:
    monkeypatch.setattr("sys.argv", ["x", *map(str, arguments)])
    main()


def test_import_prints_warnings_beside_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = next(CASES.glob("06_*")), tmp_path / "t.npz"
    command(monkeypatch, import_main, source, target, "--experts", 8, "--expert-bytes", 100)
    shown = capsys.readouterr()
    assert "format        vllm\n" in shown.out and "tokens        9 (4 prompt, 5 decode)" in shown.out
    assert shown.err == f"warning: {warnings_of(case(6))[0]}\n"
    assert load_trace(target).meta["warnings"] == warnings_of(case(6))
    command(
        monkeypatch, import_main, source, target, "--overwrite", "--experts", 8, "--expert-bytes", 9, "--strip", "all"
    )
    assert load_trace(target).tokens == 5
    command(monkeypatch, export_main, target, tmp_path / "t.bin")
    assert "accesses      " in capsys.readouterr().out and (tmp_path / "t.bin").stat().st_size % 24 == 0


def test_counts_become_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, import_main, next(CASES.glob("16_*")), tmp_path / "p.json")
    assert "format        sglang-counts: counts, a profile and no trace\nlayers        2\n" in capsys.readouterr().out
    assert load_profile(tmp_path / "p.json").counts.sum() == 32
    with pytest.raises(SpecmdError, match="already exists; --overwrite replaces it"):
        command(monkeypatch, import_main, next(CASES.glob("16_*")), tmp_path / "p.json")
