"""`experiments.recommend`: an answer or one line for every model and memory; ties; what fails beside the answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.options import tokens
from configs.recommend import RecommendConfig
from experiments import recommend
from experiments.recommending import replays
from experiments.recommending.question import ask
from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.recommend.advice import Answer, room_to_decide
from specmd_jax.report.pages.recommend.elsewhere import Holdings, elsewhere
from specmd_jax.report.pages.recommend.ties import best_of, interval, tied
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.setting import Setting
from specmd_jax.specs.models import MODELS, model
from specmd_jax.specs.published import PUBLISHED
from specmd_jax.trace import bundled, save_trace
from specmd_jax.units import GB, GIB

SMALL = RecommendConfig().smoke()
FEW = ("--smoke", "--evictions", "lru", "--prefetches", "none", "--out", "here")


def asked(**changes: Any) -> RecommendConfig:
    return dataclasses.replace(SMALL, **changes).checked()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_memory_is_answered_or_refused_in_one_line(name: str) -> None:
    answers = []
    for memory in (4, 8, 16, 24, 48, 80):
        for bits in (None, 4.5):
            try:
                question = ask(asked(model=name, memory=f"{memory}GB", bits=bits))
            except SpecmdError as error:
                assert "expected at least" in str(error) and "\n" not in str(error)
                continue
            answers.append(memory)
            spec, trace = model(name), question.routing.trace
            assert (trace.layers, trace.experts, trace.top_k) == (spec.layers, spec.experts, spec.top_k)
            assert question.spec.expert_bytes == spec.expert_bytes_at(bits or spec.weights_bits)
            assert (trace.expert_bytes == question.spec.expert_bytes).all()
            assert 0 < question.budget_bytes <= question.all_expert_bytes
            assert question.fixed_bytes + question.budget_bytes <= memory * GB
    assert 80 in answers


def test_a_recording_that_routes_otherwise_is_not_taken() -> None:
    assert ask(asked()).routing.evidence.startswith("simulated on recorded routing gpt-oss-20b")
    for name in ("Qwen3-30B-A3B", "gpt-oss-120b"):
        evidence = ask(asked(model=name, memory="80GB")).routing.evidence
        assert evidence.startswith("estimated from synthetic routing with this model's measured locality")
    assumed = ask(asked(model="DeepSeek-V3", memory="80GB", bits=4.5)).routing.evidence
    assert "the locality of Qwen3-30B-A3B, which is assumed" in assumed
    with pytest.raises(SpecmdError, match="routes top-2 of 128 experts, expected gpt-oss-120b's 36 layers and top-4"):
        ask(asked(model="gpt-oss-120b", memory="80GB", trace="bigmoe-gpt-oss-120b"))


def test_a_trace_of_one_request_is_counted_in_its_second_half(tmp_path: Path) -> None:
    save_trace(bundled("gpt-oss-20b", 60), tmp_path / "one.npz")
    routing = ask(asked(trace=str(tmp_path / "one.npz"), visits=1200)).routing
    own = routing.trace.tokens - 32 // 4
    assert routing.warmup_tokens == 32 // 4 + own // 2
    assert routing.cold.lengths[-1] == 32 // 4 and routing.cold.tokens == routing.trace.tokens


def test_it_says_what_trained_weights_have_seen_of_the_trace(tmp_path: Path) -> None:
    plain = RecommendConfig(model="gpt-oss-20b", memory="6GiB")
    assert ask(plain).routing.seen == () and "seen" not in ask(plain).stored
    trained = dataclasses.replace(plain, evictions=("lru", "learned"))
    (told,) = ask(trained).routing.seen
    assert told.startswith("the weights of learned (evictor) were trained beforehand on 14 of the 16 requests that are")
    both = ask(dataclasses.replace(trained, prefetches=("none", "learned"))).routing.seen
    assert len(both) == 2 and both[0] == told and "learned (prefetcher)" in both[1]
    trace = bundled("gpt-oss-20b")
    unnamed = dataclasses.replace(trace, meta={name: v for name, v in trace.meta.items() if name != "requests"})
    save_trace(unnamed, tmp_path / "unnamed.npz")
    (told,) = ask(dataclasses.replace(trained, trace=str(tmp_path / "unnamed.npz"))).routing.seen
    assert "on perhaps some of the 16 requests" in told
    other = dataclasses.replace(plain, model="Qwen3-30B-A3B", memory="8GiB", evictions=("learned",))
    assert ask(other).routing.seen == (), "made up routing, of another model"


def test_numbers_of_the_machine() -> None:
    machine = asked(link=12.5, machine=("launch_s=4e-5", "Link_latency_s=1e-6")).whole_machine()
    assert (machine.link_bytes_per_s, machine.launch_s, machine.link_latency_s) == (12.5e9, 4e-5, 1e-6)


def test_a_model_that_is_not_listed_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED["Qwen3-30B-A3B"], "num_experts": 96}))
    for path in (tmp_path, tmp_path / "config.json"):
        question = ask(asked(model=str(path), memory="24GiB", bits=4.5))
        assert (question.spec.experts, question.spec.weights_bits) == (96, 4.5)
        assert "the locality of Qwen3-30B-A3B, which is assumed" in question.routing.evidence
        known = replays.Replays(question).event.work
        assert float(known.dense_bytes[0]) == pytest.approx(question.spec.dense_bytes)


def test_the_context_shares_the_memory_and_is_read() -> None:
    short, long = (ask(asked(memory="8GiB", context=tokens(text))) for text in ("1024", "32k"))
    assert tokens("32k") == 32_768 and tokens("1M") == 1 << 20
    grown = long.parts["keys and values"] - short.parts["keys and values"]
    assert grown == long.spec.kv_bytes(32_768) - long.spec.kv_bytes(1024) > 0
    assert short.budget_bytes - long.budget_bytes == grown
    read = [replays.Replays(question).event.work.context_bytes for question in (short, long)]
    assert read[0] is not None and read[1] is not None and (read[1] > read[0]).all()
    assert ask(asked()).context == 4096


def test_what_host_memory_does_not_hold_is_read_from_storage() -> None:
    assert ask(asked(ram="64GiB")).host == ask(asked()).host == {}
    question = ask(asked(ram="3GiB", ssd="nvme-4"))
    assert question.host == {"host_capacity": 3 * GIB, "storage": "nvme-4"}
    (short,) = replays.Replays(question)._cells("grid", "as asked", replays.Replays(question).event, "lru", "none")
    (whole,) = replays.Replays(ask(asked()))._cells("grid", "as asked", replays.Replays(question).event, "lru", "none")
    assert short["misses"] == whole["misses"] and whole["host_misses"] == 0
    assert 0 < float(str(short["host_misses"])) < float(str(short["misses"]))
    assert float(str(short["tpot_s"])) > 1.5 * float(str(whole["tpot_s"]))
    every = question.all_expert_bytes
    (all_in,) = replays.Replays(question)._cells(
        "grid", "as asked", replays.Replays(question).event, "lru", "none", (every,)
    )
    assert all_in["misses"] == all_in["host_misses"] == 0


def test_other_rules_of_host_memory_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    question, tried = ask(asked(ram="3GiB", ssd="nvme-4")), dict[str, Setting]()

    def cells(
        self: replays.Replays, study: str, variant: str, prepared: Any, eviction: str, prefetch: str, **fields: Any
    ) -> list[Row]:
        assert self.question is question and prepared and study == "tier"
        host = {**question.host, **fields}
        tried[variant] = Setting(eviction=eviction, prefetch=prefetch, hardware=question.machine, **host)
        return []

    monkeypatch.setattr(replays.Replays, "_cells", cells)
    best: Row = cell([1.0]) | {"capacity_bytes": question.budget_bytes}
    assert not list(replays.Replays(question).beside([best])["other rules of host memory"]())
    assert [setting.prefetch for setting in tried.values() if setting.prefetch_to == "host"] == ["previous"]
    assert {setting.inclusion for setting in tried.values()} == {"inclusive", "exclusive"}


def test_drafts_are_charged_for_each_token_that_is_kept() -> None:
    plain, drafted = ask(asked()), ask(asked(drafts=2, acceptance=0.7, draft_ms=1.0))
    assert drafted.fixed_bytes - plain.fixed_bytes == 8 * plain.spec.expert_bytes  # three rows of four experts
    replayed = replays.Replays(drafted)
    (row,) = replayed._cells("grid", "as asked", replayed.event, "lru", "none")
    seconds, tokens = (np.array(str(row[name]).split(), float) for name in ("request_decode_s", "request_decodes"))
    assert row["tpot_s"] == pytest.approx(seconds.sum() / tokens.sum(), rel=1e-4)
    assert "routes of rejected drafts estimated" in str(row["evidence"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--machine", "launch=1"), "unknown number of the machine 'launch'; did you mean 'launch_s'?"),
        (("--machine", "launch_s"), "'launch_s' has no number, expected such as launch_s=1e-5"),
        (("--machine", "launch_s=-1"), "launch_s is -1.0: expected a finite time"),
        (("--machine", "launch_s=1e-5", "--machine", "link_bytes_per_s=0"), "expected a positive rate"),
        (("--link", "5", "--machine", "link_bytes_per_s=1e9"), "expected one of them"),
        (("--bits", "0"), "bits is 0.0, expected above 0"),
        (("--ram", "8GiB"), "holds 8.00 of 9.47 GiB of experts: expected --ssd"),
        (("--ram", "1GiB", "--ssd", "nvme-4"), "is 1.00 GiB, less than the 2.01 GiB of experts"),
        (("--ssd", "nvme-4"), "--ssd is given without --ram"),
        (("--drafts", "2"), "drafts is 2 without an acceptance"),
        (("--drafts", "2", "--acceptance", "1.5"), "acceptance is 1.5"),
        (("--acceptance", "0.5"), "nothing is drafted"),
        (("--ram", "8GiB", "--ssd", "nvme-9"), "unknown hardware 'nvme-9'"),
        (("--memory", "2GiB"), "expected at least 3."),
        (("--memory", "30%"), "expected bytes, such as 6GiB"),
        (("--context", "40M", "--memory", "24GiB"), "expected at most"),
        (("--context", "-1"), "context is -1, expected at least 0"),
        (("--config", "nowhere/config.json"), "nowhere/config.json"),
    ],
)
def test_bad_questions_end_in_one_line(options: tuple[str, ...], message: str) -> None:
    with pytest.raises((SpecmdError, SystemExit)) as caught:
        recommend.main([*FEW, *options])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("failing", ["none", "bound", "interrupt"])
def test_the_answer_is_there_whatever_happens_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = replays.Replays._cells

    def broken(self: replays.Replays, study: str, *rest: Any, **how: Any) -> Any:
        if study == "bound" and failing == "bound":
            raise SpecmdError("no future\nat all")
        if study == "cold" and failing == "interrupt":
            raise KeyboardInterrupt
        return cells(self, study, *rest, **how)

    monkeypatch.setattr(replays.Replays, "_cells", broken)
    question = ("--model", "Qwen3-30B-A3B", "--memory", "24GB", "--bits", "4.5")
    if failing == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            recommend.main([*FEW, *question])
    else:
        recommend.main([*FEW, *question])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Run lru: ") and "estimated from synthetic routing" in out[0]
    assert ("not answered: the bound (no future at all)" in out) == (failing == "bound")
    assert out[-1] == "here/rows.csv" and Path("here/figures/pareto.png").exists()

    rows = read_rows(Path("here"))
    whole = [row for row in rows if row["study"] == "grid" and row["capacity_pct"] == 100]
    assert whole and all(row["misses"] == 0 and row["stall_share"] == 0 for row in whole)
    assert read_manifest(Path("here"))["complete"] == (failing != "interrupt")
    studies = {row["study"] for row in rows}
    assert ("bound" in studies, "link" in studies) == (failing == "none", failing != "interrupt")
    if failing != "interrupt":
        fixed, divided = [row for row in rows if row["study"] == "host"]
        assert (fixed["miss"], divided["miss"]) == ("cpu", "split")
        assert fixed["hit_rate"] != 0 and fixed["bytes_demand"] == 0  # a fixed set that is there from the start
        pinned, competing = [row for row in rows if row["study"] == "kept"]
        assert "pins from the requests before" in str(pinned["evidence"])
        assert (pinned["misses"], competing["misses"]) == (fixed["misses"], 0)  # nearly every expert fits


# ---------------------------------------------------------------------------------------------------------- ties


def cell(times: list[float], eviction: str = "lru", prefetch: str = "none") -> Row:
    return {
        "eviction": eviction,
        "prefetch": prefetch,
        "tpot_s": float(np.mean(times)),
        "ttft_s": 1.0,
        "request_decode_s": " ".join(str(10 * time) for time in times),
        "request_decodes": " ".join(["10"] * len(times)),
    }


def test_what_requests_do_not_tell_is_a_tie() -> None:
    base = cell([1.0, 1.2, 0.9, 1.1, 1.3])
    assert tied(cell([1.005, 1.205, 0.905, 1.105, 1.305], "lfu"), base)  # below 1 %
    assert tied(cell([0.8, 1.4, 1.0, 0.9, 1.2], "lfu"), base)  # now slower, now faster
    faster = cell([0.95, 1.15, 0.85, 1.05, 1.25], "lfu")  # 5 % in every request, though the requests differ by more
    assert not tied(faster, base)
    assert not tied(cell([0.9], "lfu"), cell([1.0]))
    low, high = interval(base) or (0, 0)
    assert low < 1.1 < high and interval(cell([1.0])) is None


def test_it_says_how_long_a_policy_may_take_to_decide() -> None:
    lru, online, fast = cell([1.5, 1.7]), cell([1.1, 1.3], "online"), cell([1.0, 1.2], "adaptive")
    same = cell([1.001, 1.201], "lfu")
    answer = Answer([], [fast, same, online, lru], [], None, None, {"shape": [10, 4, 2]})
    assert room_to_decide(answer, lru) == (
        "what a policy itself takes to decide is not counted: this one may take 10000 us a layer more than online, or "
        "50000 us a layer more than lru, before those are as fast"
    )
    assert "this one may take 50000 us a layer more than lru, before" in room_to_decide(
        answer._replace(here=[fast, same, lru]), lru
    )


def test_of_a_tie_the_plainest_is_best() -> None:
    lru, fast = cell([1.0, 1.2, 0.9]), cell([0.8, 1.0, 0.7], "online")
    same = cell([0.799, 1.001, 0.699], "online", "previous")
    assert best_of([lru, same, fast]) is fast
    assert best_of([lru, same]) is same
    assert best_of([same, fast, cell([0.801, 1.0, 0.7])])["eviction"] == "lru"


def rests(lines: Iterator[str]) -> list[str]:
    return [line.split("  ", 1)[1].strip() for line in lines]


def test_other_engines_by_hand() -> None:
    held = Holdings(layers=10, experts=8, expert_bytes=GIB // 8, cache_bytes=int(3.6 * GIB), fixed_bytes=2 * GIB)
    llama, transformers, vllm = rests(iter(elsewhere(held)))
    assert llama.startswith("-ngl 99 --n-cpu-moe 7   the experts of 3 of 10")
    assert transformers.startswith("--kt-num-gpu-experts 2   2 of 8 experts")
    assert vllm.startswith("--cpu-offload-gb 7   6.4 GiB of the 12.0 GiB")
    all_in = rests(iter(elsewhere(held._replace(cache_bytes=10 * GIB))))
    assert [line.split("   ")[0].split()[-1] for line in all_in] == ["0", "8", "0"]
