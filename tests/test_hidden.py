"""Maps from activations to routers: what they learn, what they cost, what is read of the model; recall of scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import small_trace

from configs.hidden_prefetch import HiddenPrefetchConfig
from experiments.offloading.reading import held_out_texts, read_texts
from experiments.studies import hidden_prefetch as study
from specmd_jax import bundled
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.evaluation import recall_by_request
from specmd_jax.learn.hidden import fit_maps, predicted, recalled, shown
from specmd_jax.learn.settings import MapSettings
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.hidden_prefetch import findings, table


def test_recall_counts_by_request_and_layer() -> None:
    scores = np.array([[[0.4, 0.3, 0.2, 0.1]], [[0.1, 0.1, 0.7, 0.1]], [[0.0, 0.0, 0.0, 1.0]]], np.float32)
    ids = np.array([[[0, 3]], [[2, 1]], [[3, 0]]])
    # best two: 0 1, 2 0, 3 0 (ties: the lower id); best one: 0, 2, 3
    found = recalled(scores, ids, np.array([2, 1]), [1, 2])
    assert found[:, :, 0].tolist() == [[2, 1], [2, 2], [4, 2]]


def test_maps_find_the_router_that_is_there() -> None:
    draw = np.random.default_rng(1)
    layers, width, experts = 2, 16, 8
    x = draw.normal(0, 3, (600, layers, width)).astype(np.float16)
    truth = draw.normal(0, 1, (layers, experts, width)).astype(np.float32)
    wide = x.astype(np.float32)
    logits = np.einsum("nsd,sed->nse", wide / np.sqrt((wide**2).mean(-1, keepdims=True)), truth)
    ids = np.argsort(-logits, axis=-1)[..., :2]
    train, validation = (shown(x[part], logits[part], ids[part], 0) for part in (slice(0, 500), slice(500, 600)))
    settings = MapSettings(epochs=12, batch=50, learning_rate=0.05, weight_decay=0.0)
    wrong = np.zeros_like(truth)
    told = {}
    for rank in (0, 2):
        fitted = fit_maps(train, validation, wrong, replace(settings, rank=rank))
        right = recalled(predicted(fitted.maps, validation.activations), validation.ids, np.array([100]), [2])
        told[rank] = right[0].sum() / right[1].sum()
        assert told[rank] == pytest.approx(fitted.validation_recall)
        inner = width * experts if rank == 0 else 2 * (width + experts)
        assert fitted.maps.cost.flops == 2 * inner and fitted.maps.cost.read_bytes == 2 * (inner + experts)
    assert told[0] > 0.93 > told[2] > 0.35  # two directions of sixteen hold less, but more than the 1/4 of chance
    perfect = fit_maps(train, validation, truth, MapSettings(epochs=1, learning_rate=1e-6))
    assert perfect.validation_recall == pytest.approx(1, abs=0.01)  # begins as the router that it is given


def test_layers_ahead_are_paired_with_their_routers() -> None:
    x, logits = np.zeros((3, 4, 2), np.float16), np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    found = shown(x, logits, np.zeros((3, 4, 1), np.uint8), 1)
    assert found.activations.shape == (3, 3, 2) and (found.logits == logits[:, 1:]).all()
    with pytest.raises(SpecmdError, match="4 layers ahead of 4: expected 0 to 3"):
        shown(x, logits, np.zeros((3, 4, 1), np.uint8), 4)
    bad = {
        "rank is -1": MapSettings(rank=-1),
        "epochs is 0": MapSettings(epochs=0),
        "rate": MapSettings(learning_rate=2),
    }
    for said, settings in bad.items():
        with pytest.raises(SpecmdError, match=said):
            settings.check()


def test_recall_of_recorded_scores_is_that_of_the_scores() -> None:
    trace = small_trace(3, prompt_tokens=0)
    assert trace.ahead is not None
    found = recall_by_request(trace, "gate_ahead", [1, 2])[:, :, 1:]
    wanted = recalled(trace.ahead[:, :-1], trace.expert_ids[:, 1:].astype(np.int64), trace.lengths, [1, 2])
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(SpecmdError, match="recall of perfect: it reads the future"):
        recall_by_request(trace, "perfect", [1])
    with pytest.raises(SpecmdError, match="recall of gate_ahead, 2 layers ahead: it looks at most 1 ahead"):
        recall_by_request(trace, "gate_ahead", [1], ahead=2)
    bare = small_trace(3, with_ahead=False)
    with pytest.raises(SpecmdError, match="recall of gate_ahead: the trace has no scores of the next layer"):
        recall_by_request(bare, "gate_ahead", [1])


@pytest.fixture(scope="module")
def reading() -> study.Reading:
    return read_texts(held_out_texts([0, 4], 24), "a test")


def test_what_is_read_is_what_is_bundled(reading: study.Reading) -> None:
    trace, own = reading.trace, bundled("specmd-reference")
    assert trace.logits is not None and own.logits is not None
    starts = np.cumsum(own.lengths) - own.lengths
    rows = np.concatenate([np.arange(starts[r], starts[r] + 24) for r in (0, 5, 1, 6, 2, 7, 3, 8, 4, 9)])
    assert [row["category"] for row in trace.meta["requests"][:3]] == ["prose", "prose", "chinese"]
    # that one was run in bfloat16, and its logits are rounded
    assert (np.sort(trace.expert_ids, axis=-1) == np.sort(own.expert_ids[rows], axis=-1)).mean() > 0.97
    assert np.abs(trace.logits - own.logits[rows]).mean() < 0.05
    np.testing.assert_allclose(
        np.einsum("nld,led->nle", reading.after.astype(np.float32), reading.routers), trace.logits, atol=0.02
    )
    assert trace.expert_bytes.tolist() == own.expert_bytes.tolist()
    assert sum(trace.meta["dense_bytes"]) == sum(own.meta["dense_bytes"])
    assert np.argmax(trace.meta["dense_bytes"]) == trace.layers - 1  # the last layer reads the head, too


def test_some_texts_of_a_reading(reading: study.Reading) -> None:
    part = reading.of(np.array([3, 0]))
    np.testing.assert_array_equal(part.trace.expert_ids[24:], reading.trace.expert_ids[:24])
    np.testing.assert_array_equal(part.before[:24], reading.before[72:96])
    with pytest.raises(SpecmdError, match=r"texts of each domain: \[8\], expected some of 0 to 7"):
        held_out_texts([8])
    with pytest.raises(SpecmdError, match="tokens of a text: 513, expected 1 to 512"):
        held_out_texts([0], 513)


def test_no_text_trains_and_judges(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match=r"texts \[5\] are to judge and to train"):
        HiddenPrefetchConfig(test=(5, 6)).checked()
    texts, parts = study.gather(HiddenPrefetchConfig().smoke())
    assert {name: rows.shape for name, rows in texts.items()} == dict.fromkeys(texts, (3, 16))
    assert [part.tolist() for part in parts] == [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [2, 5, 8, 11, 14]]
    for name in ("data.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SpecmdError, match=str(tmp_path)):
        study.gather(HiddenPrefetchConfig(data=str(tmp_path)))


def test_predictions_are_fed_as_the_next_gates_scores(reading: study.Reading) -> None:
    work = study.Work(HiddenPrefetchConfig(aheads=(1,), ranks=(), maps=MapSettings(epochs=1)), Path(), {}, None)  # type: ignore[arg-type]
    work.__dict__ |= {"reading": reading, "test": reading}
    work.parts = study.Split(np.arange(8), np.arange(8, 10), np.arange(10))
    name = study.BEFORE
    fed = work.fed(name)
    assert fed.ahead is not None and fed.ahead.shape == reading.trace.logits.shape  # type: ignore[union-attr]
    np.testing.assert_array_equal(fed.ahead[:, :-1], work.scored(name))
    np.testing.assert_allclose(fed.ahead[:, :-1].sum(axis=-1), 1, atol=1e-5)
    assert not fed.ahead[:, -1].any()
    right = recall_by_request(fed, "gate_ahead", [4])[:, :, 1:]
    own = recalled(work.scored(name), fed.expert_ids[:, 1:].astype(np.int64), fed.lengths, [4])
    np.testing.assert_array_equal(right, own)


# ------------------------------------------------------------------------------------------------- what is said of it


def _told(study_: str, measure: str, **given: Any) -> Row:
    return dict.fromkeys(table.COLUMNS) | {"study": study_, "measure": measure} | given


def test_sentences_follow_from_the_table() -> None:
    recalls = {table.BEFORE: 0.8, table.IDS: 0.7, table.GATE: 0.83, table.low_rank(8): 0.6}
    rows = [_told("recall", "recall", predictor=p, ahead=1, count=1.0, value=at) for p, at in recalls.items()]
    rows += [_told("recall", "recall", predictor=table.BEFORE, ahead=1, count=1.0, layer=3, value=0.8)]
    rows += [_told("recall", "recall", predictor=table.BEFORE, ahead=0, count=1.0, value=0.9)]
    for name, adds, work_s in (
        (table.BEFORE, 1000.0, 1e-6),
        (table.IDS, 4000.0, 2e-6),
        (table.low_rank(8), 250.0, 0.0),
    ):
        rows += [_told("cost", "multiply-adds", predictor=name, value=adds)]
        rows += [_told("cost", "bytes read", predictor=name, value=2 * adds)]
        rows += [_told("cost", "s a visit", predictor=name, value=work_s)]
    for name, size, stall_s, free, charged, launched in (
        (table.BEFORE, "25%", 4e-5, 0.6, 0.5, 0.2), (table.BEFORE, "50%", 3e-5, 0.5, 0.4, -0.1),
        (table.IDS, "25%", 8e-5, 0.2, 0.1, 0.0), (table.IDS, "50%", 2e-5, 0.7, 0.6, 0.5),
    ):  # fmt: skip
        shared = {"predictor": name, "capacity": size, "link": "0.5"}
        rows += [_told("replay", "stall, s a token, free", value=stall_s, **shared)]
        shares = {"free": free, "charged": charged, "launched": launched}
        rows += [_told("replay", f"stall saved, {charge}", value=at, **shared) for charge, at in shares.items()]
    rows += [_told("replay", "layer time, s", link="0.5", value=4e-5)]
    said = [text for text, _ in findings.answer(rows)]
    assert findings.title(rows).endswith("names 80 % of the next layer's experts, a predictor of ids alone 70 %")
    assert said[0].endswith("1 K predicted: gate_ahead 83.0 %, map before attention 80.0 %, learned from ids 70.0 %.")
    assert "rank 8 has 60.0 % for 25 % of the operations (the full one 80.0 %)" in said[1]
    assert "names 90.0 % of its own layer, 80.0 % of the next." in said[2]
    assert (
        "with a copy in 0.5 layer times: at 25% map before attention 50 %" in said[3]
        and "learned from ids 60 %" in said[3]
    )
    # 40 us a token less at 25%, 10 more at 50%, of 4 layers
    assert "is worth -2.5 us a layer (at 50%, a copy in 0.5 layer times) to 10.0 us a layer (at 25%" in said[4]
    assert said[5].endswith(
        "the 40 us of a layer, the map saves -10 to 20 % of the stall, inside of another 50 to 60 %."
    )
    without = [row for row in rows if row["predictor"] != table.IDS]
    assert "ids" not in findings.title(without) + "".join(text for text, _ in findings.answer(without))
