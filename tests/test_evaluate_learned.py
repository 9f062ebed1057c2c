"""The study of the learned policies: what it holds out, its controls, and what it prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from parity import LINK
from test_learned import TOY, recorded

from experiments import evaluate_learned
from experiments.common import libcachesim
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.learn import controls, training
from specmd_jax.learn import stall as timeline
from specmd_jax.learn.evaluation import held_out, hits_by_request, recall_by_request
from specmd_jax.learn.splits import Split, split
from specmd_jax.policies import trained as learned
from specmd_jax.policies.choice import Mix
from specmd_jax.report.pages.evaluate_learned import AFTER, BEGUN
from specmd_jax.report.reader import read_rows
from specmd_jax.setting import Setting
from specmd_jax.trace import save_trace, select_requests, synthesize
from specmd_jax.types import Trace


def named(requests: int = 8, **options: Any) -> Trace:
    """Recorded requests of four categories."""
    trace = recorded(requests=requests, **options)
    return replace(trace, meta={**trace.meta, "requests": [{"category": "abcd"[r % 4]} for r in range(requests)]})


def card(trace: Trace, parts: Split, unit: str = "category") -> dict[str, Any]:
    done = training.Trained(learned.load("evictor"), parts, {}, 1.0, {})
    return training.card(trace, replace(TOY, split=unit), done)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both heads, trained a little on `named`."""
    folder = tmp_path_factory.mktemp("weights")
    trace = named()
    for head in learned.HEADS:
        settings = replace(TOY, head=head, split="category", epochs=1)
        parts = split(trace, "category", settings.seed)  # given, as it would be drawn
        done = training.fit(trace, settings, folder / f"run_{head}", lambda line: None, parts)
        training.export(folder / f"{head}.npz", done.weights, head, training.card(trace, settings, done))
    return folder


def test_only_groups_that_training_did_not_have_are_held_out() -> None:
    trace = named()
    parts = split(trace, "category", 0)
    said, digest = card(trace, parts), training.fingerprint(trace)
    whole = held_out(trace, said, digest)
    assert whole.requests.tolist() == parts.test.tolist() and whole.trained.tolist() == parts.train.tolist()
    part = select_requests(trace, sorted([*parts.test[:1], *parts.train[:1]]))
    few = held_out(part, said, training.fingerprint(part))
    assert [trace.meta["requests"][int(parts.test[0])]] == [part.meta["requests"][int(r)] for r in few.requests]
    with pytest.raises(SpecmdError, match="training or validation had each category"):
        held_out(select_requests(trace, parts.train), said, "")
    other = replace(trace, meta={**trace.meta, "model": "another"})
    assert len(held_out(other, said, digest).requests) == 8
    unnamed = replace(trace, meta={k: v for k, v in trace.meta.items() if k != "requests"})
    assert "names no category" in held_out(unnamed, said, digest).why
    numbered = card(trace, parts, "request")
    assert held_out(trace, numbered, digest).requests.tolist() == parts.test.tolist()
    assert len(held_out(part, numbered, "different").requests) == part.requests


def test_a_group_is_in_the_same_part_of_a_smaller_trace() -> None:
    names = [f"group {n}" for n in range(40)]
    trace = recorded(requests=40, tokens=4)
    trace = replace(trace, meta={**trace.meta, "requests": [{"category": name} for name in names]})
    half = select_requests(trace, range(0, 40, 2))
    for seed in range(3):
        whole, part = split(trace, "category", seed), split(half, "category", seed)
        for large, small in zip(whole, part, strict=True):
            assert {trace.meta["requests"][int(r)]["category"] for r in large} >= {
                half.meta["requests"][int(r)]["category"] for r in small
            }


def test_controls_change_what_they_should_and_nothing_else(checkpoints: Path) -> None:
    trace = named(tokens=30)
    budgets = [Setting(capacity="50%", scope=scope).budget(trace) for scope in ("global", "global")]
    file = str(checkpoints / "evictor.npz")
    plain = hits_by_request(trace, "learned", budgets, {"checkpoint": file})
    assert plain.shape == (2, trace.requests) and (plain[0] == plain[1]).all()
    for policy in (controls.frozen_at_access(file), controls.refreshed(file), controls.misplaced(file, 1)):
        assert (hits_by_request(trace, policy, budgets) != plain).any()
    layers = [Setting(capacity="50%", scope="layer").budget(trace)]
    by_layer = hits_by_request(trace, "learned", layers, {"checkpoint": file})
    # where a layer is its own pool, its scores are always those of the visit that decides
    np.testing.assert_array_equal(hits_by_request(trace, controls.refreshed(file), layers), by_layer)
    counts = controls.uses(trace, np.array([0, 1]))
    assert counts.sum() == 2 * trace.layers * trace.lengths[:2].sum()
    fixed = hits_by_request(trace, controls.popularity(counts), layers)
    assert (fixed <= hits_by_request(trace, "belady", layers)).all()


def test_shuffled_tokens_are_the_same_tokens() -> None:
    trace = named()
    mixed = controls.time_shuffled(trace)
    for first, length in zip(np.cumsum(trace.lengths) - trace.lengths, trace.lengths, strict=True):
        mine, theirs = (t.expert_ids[first : first + length].reshape(length, -1) for t in (trace, mixed))
        assert sorted(map(tuple, mine.tolist())) == sorted(map(tuple, theirs.tolist()))
    assert (mixed.expert_ids != trace.expert_ids).any()


def test_shared_runs_are_found() -> None:
    trace = select_requests(named(), [0, 0, 1])
    runs, shared = controls.shared_runs(trace, np.array([0]), np.array([1]), 2, trace.layers)
    assert runs == shared == trace.lengths[0] - 1
    assert controls.shared_runs(trace, np.array([0]), np.array([2]), 8, trace.layers)[1] == 0


def test_recall_counts_what_was_predicted() -> None:
    trace = named(tokens=12)
    counts = (1, trace.experts)
    for ahead in (1, 2, trace.layers):
        found = recall_by_request(trace, "learned", counts, ahead=ahead)
        assert found.shape == (3, trace.requests, trace.layers)
        np.testing.assert_array_equal(found[1], found[2])  # who predicts everything finds everything
        assert found[2].sum() == trace.top_k * (trace.lengths * trace.layers - ahead).sum()
    late = recall_by_request(trace, "previous", counts, ahead=trace.layers)
    demand = trace.expert_ids.astype(int)
    firsts = np.cumsum(trace.lengths) - trace.lengths
    inner = np.setdiff1d(np.arange(trace.tokens), firsts)
    kept = sum(
        len(set(demand[n, layer]) & set(demand[n - 1, layer])) for n in inner for layer in range(trace.layers)
    )  # fmt: skip
    assert late[1].sum() == kept


def test_seconds_add_up_and_the_predictor_is_charged() -> None:
    trace = named(tokens=16)
    replays = prepare(trace, reset_per_request=True)
    machine = timeline.with_link(LINK, replays, 0.5)
    layer_s = timeline.layer_time_s(replays, machine)
    mean_copy_s = float(np.mean(trace.expert_bytes)) / float(machine.link_bytes_per_s)
    assert mean_copy_s == pytest.approx(0.5 * layer_s)
    budget = Setting(capacity="50%", scope="layer").budget(trace)
    plain = timeline.seconds_by_request(replays, Mix.of("lru"), budget, machine)
    slow = timeline.seconds_by_request(replays, Mix.of("lru"), budget, machine, 1e-5)
    assert plain.hits.tolist() == slow.hits.tolist() == hits_by_request(trace, "lru", [budget])[0].tolist()
    visits = trace.lengths * trace.layers
    np.testing.assert_allclose(slow.total_s, plain.total_s + 1e-5 * visits, rtol=1e-5)
    bounds = timeline.bounds_by_request(trace, budget, machine)
    assert (bounds.lower_s <= bounds.feasible_s * (1 + 1e-9)).all()
    assert (bounds.lower_s <= plain.stall_s * (1 + 1e-6)).all()
    cost = timeline.cost(learned.load("evictor"), 24, 32)
    other = timeline.cost(learned.load("evictor"), 3, 6)
    assert cost.flops > other.flops > 0
    assert timeline.cost(learned.load("evictor"), 24, 32, 3).flops == 3 * cost.flops
    assert cost.seconds(machine, True) == pytest.approx(cost.seconds(machine, False) + float(machine.launch_s))


@pytest.mark.slow
def test_the_study_runs_on_a_trace_and_weights_of_ones_own(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "mine.npz", tmp_path / "out"
    save_trace(named(), path)
    arguments = ["--smoke", "--trace", str(path), "--checkpoint", str(checkpoints), "--out", str(out)]
    evaluate_learned.main(arguments)
    said = capsys.readouterr().out
    assert "groups by category that training did not have" in said and "Gap closed" in said
    rows = read_rows(out)
    cells = {(row["study"], row["measure"], row["policy"]): row for row in rows if row["layer"] is None}
    assert cells["gap", "gap closed", "belady"]["value"] == 1.0
    assert cells["gap", "gap closed", "lru"]["value"] == 0.0
    assert {cells["gap", "gap closed", name]["value"] is None for name in (BEGUN, AFTER)} == {False}
    assert cells["recall", "recall", "learned"]["value"] is not None
    assert {"frozen at access", "misplaced scores", "frozen popularity"} <= {
        row["policy"] for row in rows if row["measure"] == "control"
    }
    assert (out / "figures" / "gap.png").exists() and (out / "figures" / "recall.png").exists()
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["complete"]
    before = (out / "rows.csv").read_bytes()
    evaluate_learned.main(arguments)
    assert (out / "rows.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "gpt-oss"], "did you mean 'gpt-oss-20b'"),
        (["--checkpoint", "nowhere.npz"], r"nowhere\.json: No such file"),
        (["--scope", "row"], "unknown scope 'row'"),
        (["--requests", "-1"], "requests is -1"),
        (["--smoke", "--link", "0"], "link is 0, expected layer times above 0"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match=message):
        evaluate_learned.main([*arguments, "--out", str(tmp_path / "out")])


class _Lru:
    """What `experiments.common.libcachesim` uses of libCacheSim's LRU."""

    def __init__(self, bytes_: int, hashpower: int) -> None:
        self.most, self.ids = bytes_ // 100, list[int]()

    def get(self, request: Any) -> bool:
        hit = request.obj_id in self.ids
        if hit:
            self.ids.remove(request.obj_id)
        self.ids = [*self.ids, request.obj_id][-self.most :]
        return hit


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_rivals_lru_is_ours(monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    trace = synthesize(layers=3, experts=8, top_k=2, tokens=30, requests=3)
    library = SimpleNamespace(LRU=_Lru, Request=SimpleNamespace)
    monkeypatch.setattr(libcachesim, "import_module", lambda name: library)
    size = int(trace.expert_bytes[0])
    slots = [np.array([3, 4, 8]), np.array([5, 3, 3]), np.array([2, 8, 8])] if scope == "layer" else [9, 14, 2]
    budgets = [count * size for count in slots]
    found = libcachesim.rival_hits_by_request(trace, "LRU", budgets)
    ours = hits_by_request(trace, "lru", budgets, contract="sequential")
    np.testing.assert_array_equal(found[:2], ours[:2])
    assert ours[:2].any() and (found[2] == -1).all()  # a pool too small for some of its caches
