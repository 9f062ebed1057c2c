"""Quality against speed: what the rows say, the paper's claims on made-up rows, and a model that reads for real."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_cases import checkpoint_tensors, save

from configs.quality import QualityConfig
from experiments.studies import quality as work
from experiments.studies.pack_moe import write_texts
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint.folder import load_config
from specmd_jax.moe.measure.quality import Places
from specmd_jax.reference import HELD_OUT, HeldOut, held_out_texts
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.paper.claims import CLAIMS
from specmd_jax.report.pages.paper.results import Results
from specmd_jax.report.pages.quality.front import collapsed, front, safe
from specmd_jax.report.pages.quality.page import answer, fastest, title
from specmd_jax.report.pages.quality.table import TABLE
from specmd_jax.report.reader import read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.verdicts import CONTRADICTED, DIRECTION, REPRODUCED, UNTESTABLE


def row(rule: str, tpot_ms: float, change: float, kl: float, **more: Any) -> Row:
    """A row at 5 % of a rule whose name begins with its policy."""
    policy, _, given = rule.partition(" ")
    by_cache = policy == "cache_aware"
    found: Row = {name: 0.0 if column.kind == "float" else None for name, column in TABLE.columns.items()}
    found |= {
        "model": "M", "rule": rule, "miss": "fetch" if by_cache else policy,
        "routing": policy if by_cache else "standard", "number": float(given) if given else None, "precisions": "int4",
        "capacity_pct": 5.0, "tpot_s": tpot_ms / 1e3, "change_pct": change, "kl_nats": kl, "perplexity": 10.0,
        "resident_perplexity": 10.0, "events_equal": True,
    }  # fmt: skip
    return found | more


FETCH = row("fetch", 20, 0.0, 0.0)
DROP = row("drop 2", 12, 1.5, 0.03, dropped_share=0.1)
MORE = row("drop 1", 9, 4.0, 0.1, dropped_share=0.2)
PRIORITY = row("fetch_priority", 14, 0.2, 0.002)
MOVED = row("substitute 1", 2, 90.0, 2.5, moved_share=0.4, perplexity=30.0)
LITTLE = row("substitute 0.1", 15, 1.0, 0.05, moved_share=0.02)
NEAR, FAR = row("cache_aware 0.3", 17.5, 1.0, 0.01), row("cache_aware 1", 5, 50.0, 1.5)
ALL = [FETCH, DROP, MORE, PRIORITY, MOVED, LITTLE, NEAR, FAR]


def test_the_front_is_what_nothing_beats() -> None:
    assert front(ALL) == [MOVED, FAR, MORE, DROP, PRIORITY, FETCH]  # both others are slower and farther than PRIORITY
    same = FETCH | {"rule": "substitute 0.1"}  # nothing stood in for anything
    assert [it["rule"] for it in front([FETCH, same])] == ["fetch"]
    assert fastest(ALL) is DROP and fastest([MORE]) is None
    assert [safe(it) for it in (DROP, MORE)] == [True, False] and [collapsed(it) for it in ALL].count(True) == 1
    assert title(ALL, "int4") == (
        "M: drop 2 is the fastest rule within 2 % of the bits per byte with 5 % cached, 40 % less time a token than "
        "fetching at int4"
    )
    assert title([MORE], "int4") == "M: no rule stays within 2 % of the bits per byte with 5 % cached"
    told = " ".join(it.text for it in answer([*ALL, DROP | {"events_equal": False}], "int4"))
    assert "3 times" not in told and "2 times as high or more under substitute 1 at 5 %" in told
    assert f"In {len(ALL)} of {len(ALL) + 1} runs" in told


@pytest.mark.parametrize(
    ("claim", "rows", "verdict"),
    [
        ("The same on held-out text: fetch-priority", ALL, REPRODUCED),
        ("The same on held-out text: fetch-priority", [*ALL, row("drop 3", 13, 0.1, 0.001)], CONTRADICTED),
        ("Substitution collapses", ALL, CONTRADICTED),  # one of two
        ("Substitution collapses", [FETCH, MOVED], REPRODUCED),
        ("Substitution collapses", [FETCH, row("substitute 1", 20, 0.0, 0.0)], UNTESTABLE),  # nothing moved
        ("The same, read as: substitution is not safe", [MOVED, MOVED, LITTLE], DIRECTION),
        ("Dropping is safe from rank 3", ALL, REPRODUCED),
        ("Dropping is safe from rank 3", [DROP | {"change_pct": 2.1}], CONTRADICTED),
        ("Dropping rank 2 as well is not safe", ALL, REPRODUCED),
        ("Wider mixtures", ALL, UNTESTABLE),
        ("The same of decoding, where the model goes on", ALL, REPRODUCED),  # 14 %
        ("The same of decoding, where the model goes on", [FETCH, NEAR | {"tpot_s": 0.021}], CONTRADICTED),
        ("A strength of 0.1 to 0.5", ALL, REPRODUCED),
        ("A strength of 0.1 to 0.5", [FETCH, NEAR, FAR | {"change_pct": 1.0}], CONTRADICTED),
    ],
)
def test_a_claim_on_quality_follows_the_rows(claim: str, rows: list[Row], verdict: str) -> None:
    (found,) = [it for it in CLAIMS if it.text.startswith(claim)]
    assert found.judge(Results([], rows), ["M"]).verdict == verdict
    assert found.judge(Results([]), ["M"]).verdict == UNTESTABLE


def test_bits_per_byte_are_a_plain_mean_of_domains_and_errors_are_of_differences() -> None:
    text = work.Text(np.zeros((3, 1), np.int32), np.zeros((3, 2), np.int32), ("code", "code", "maths"),
                     np.array([2.0, 2.0, 4.0]))  # fmt: skip
    resident = np.full((3, 2), 4 * np.log(2))  # bits: 4, so 2 per byte of code and 1 of maths
    ours = resident + np.log(2) * np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    found = work._scores(text, Places(np.zeros((3, 2), bool), np.zeros((3, 2)), ours, resident))
    assert found["resident_bits_per_byte"] == pytest.approx(1.5) and found["bits_per_byte"] == pytest.approx(1.875)
    assert found["change_pct"] == pytest.approx(25) and found["places"] == 6
    # code is always half a bit per byte worse; maths by 0 or half a bit: 0.25 of standard error, half of it in the mean
    assert found["change_se_pct"] == pytest.approx(100 * 0.125 / 1.5)
    assert (found["bits_code"], found["bits_maths"], found["bits_prose"]) == (
        pytest.approx(2.5),
        pytest.approx(1.25),
        None,
    )


def test_too_little_text_is_one_line() -> None:
    with pytest.raises(SpecmdError, match=r"1 held-out texts of 9 tokens of code, expected at least 2 of 5"):
        work.read_text(
            {"code": HeldOut(np.zeros((1, 9), np.uint16), 2.0)}, QualityConfig(windows=2, steps=4, prompt_tokens=1)
        )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"code": np.zeros((1, 9), np.int32)}, "bytes_per_token above 0, one for each"),
        ({"bytes_per_token": np.ones(0)}, "expected windows of each domain"),
        ({"code": np.zeros((1, 9)), "bytes_per_token": np.ones(1)}, "code is float64 [1, 9], expected token ids"),
        ({"code": -np.ones((1, 9), np.int32), "bytes_per_token": np.ones(1)}, "expected token ids"),
    ],
)
def test_a_file_of_other_arrays_is_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / HELD_OUT, **arrays)
    with pytest.raises(SpecmdError, match=re.escape(message)):
        held_out_texts(tmp_path)
    (tmp_path / HELD_OUT).write_bytes(b"no zip")
    with pytest.raises(SpecmdError, match=HELD_OUT):
        held_out_texts(tmp_path)


def test_a_rule_reads_what_its_replay_counts(tmp_path: Path) -> None:
    """A tiny model with random weights, in a folder of its own with text beside it."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    save(model, "olmoe", checkpoint_tensors("olmoe"))
    cfg = load_config(model)
    rng = np.random.default_rng(0)
    texts = {
        name: HeldOut(rng.integers(0, cfg.vocabulary, (1, 12)).astype(np.uint16), 2.0) for name in ("code", "prose")
    }
    write_texts(model / HELD_OUT, texts)
    config = QualityConfig(
        model=str(model), rules=("precisions", "priority"), precisions=("native",), low="int8", high="native",
        capacities_pct=(60.0,), prompt_tokens=1, steps=8, sizes="own",
    )  # fmt: skip
    work.run(config, out, overwrite=False, resume=False)
    native, mixed = read_rows(out)
    known = ("change_pct", "kl_nats", "changed_tokens", "events_equal", "mean_bits", "model", "capacity_slots")
    experts = len(cfg.moe_layers) * cfg.experts
    assert [native[name] for name in known] == [0, 0, 0, None, 32, "model", int(0.6 * experts / 2)]  # float32
    assert mixed["events_equal"] is True and mixed["capacity_slots"] == native["capacity_slots"]
    assert number(mixed, "kl_nats") > 0 and 8 < number(mixed, "mean_bits") < 32
    assert mixed["dropped_share"] == mixed["moved_share"] == 0
    for name in ("copied_share", "tpot_s"):
        assert 0 < number(mixed, name) < number(native, name)
    before = (out / "rows.csv").read_bytes()
    work.run(config, out, overwrite=False, resume=False)  # nothing is left to do
    assert (out / "rows.csv").read_bytes() == before
    with pytest.raises(SpecmdError, match="--overwrite"):
        work.run(replace(config, steps=7), out, overwrite=False, resume=False)
