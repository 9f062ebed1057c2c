"""Learned policies: their integers, their checkpoints, and the training that makes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import run_until
from parity import compare, small_trace
from reference import history as remembered
from reference import trained

from experiments import train_evictor
from specmd_jax import run
from specmd_jax.errors import SpecmdError
from specmd_jax.learn import device, predictor, training
from specmd_jax.learn import examples as features
from specmd_jax.learn.evaluation import ratio
from specmd_jax.learn.splits import split
from specmd_jax.policies import trained as learned
from specmd_jax.policies import use_history as history
from specmd_jax.policies.choice import Mix
from specmd_jax.policies.trained import Context, Free, Tied, Weights
from specmd_jax.trace import synthesize
from specmd_jax.types import Trace

LAYERS, EXPERTS = 4, 8  # of `small_trace`
TOY = training.Settings("evictor", split="request", epochs=3, batch=16, hidden=4, width=3, topics=2, every=2)


def drawn(seed: int = 0) -> Weights:
    """Random weights for the shape of `small_trace`."""
    rng = np.random.default_rng(seed)

    def integers(kind: Any, most: int, *shape: int) -> Any:
        return rng.integers(-most, most, shape, endpoint=True).astype(kind)

    def free() -> Free:
        return Free(
            integers(np.int16, 60, history.FEATURES, 5), integers(np.int32, 9000, 5), integers(np.int16, 90, 5),
            integers(np.int32, 900),
        )  # fmt: skip

    def context(maps: int, width: int) -> Context:
        return Context(
            integers(np.int8, 127, maps, LAYERS * EXPERTS, width), integers(np.int32, 500, LAYERS, width),
            integers(np.int8, 127, LAYERS, EXPERTS, width),
        )  # fmt: skip

    return Weights(free(), Tied(free(), integers(np.int32, 9000, LAYERS, EXPERTS), context(LAYERS, 3), context(1, 2)))


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, str]:
    """Files of random weights, one a head."""
    for seed, head in enumerate(learned.HEADS):
        training.export(tmp_path / f"{head}.npz", drawn(seed), head, {})
    return {head: str(tmp_path / f"{head}.npz") for head in learned.HEADS}


def recorded(tokens: int = 20, requests: int = 6, seed: int = 0) -> Trace:
    """Decoded tokens only."""
    return synthesize(
        layers=3, experts=6, top_k=2, tokens=tokens, requests=requests, prompt_tokens=0, seed=seed, with_logits=False
    )


def seen_by(memory: history.History, layer: Any, demand: Any, mass: Any) -> history.History:
    """The tables after one more visit."""
    row = history.seen(jax.tree.map(lambda table: table[layer], memory), jnp.asarray(demand), jnp.asarray(mass))
    return jax.tree.map(lambda table, new: table.at[layer].set(new), memory, row)


@pytest.mark.parametrize("budget", [200_000, np.array([130_000, 80_000, 125_000, 95_000])], ids=["global", "layer"])
def test_weights_of_the_shape_equal_the_reference(checkpoints: dict[str, str], budget: Any) -> None:
    numbers = {
        "eviction": {"checkpoint": checkpoints["evictor"]},
        "prefetch": {"checkpoint": checkpoints["prefetcher"]},
        "selection": {"count": 2.0},
    }
    for seed in range(3):
        compare(small_trace(seed), Mix.of("learned", "learned", numbers=numbers), budget, horizon=2)


def test_scores_are_exact_and_differ_by_context() -> None:
    weights = drawn()
    rng = np.random.default_rng(1)
    slow = trained.Network.__new__(trained.Network)
    slow.arrays = {name: np.asarray(x).astype(np.int64) for name, x in learned.flatten(weights).items()}
    slow.memory = [[remembered.Expert() for _ in range(EXPERTS)] for _ in range(LAYERS)]
    slow.tied = True
    memory = history.blank(LAYERS, EXPERTS)
    score, see = jax.jit(lambda memory, rows: learned.scores(weights, memory, rows)), jax.jit(seen_by)
    for visit in range(60):
        layer = visit % LAYERS
        used = {int(e): np.float32(rng.random()) for e in rng.choice(EXPERTS, 3, replace=False)}
        demand = np.isin(np.arange(EXPERTS), list(used))
        mass = np.array([used.get(e, 0) for e in range(EXPERTS)], np.float32)
        memory = see(memory, layer, demand, mass)
        slow.visit(layer, used)
        found = np.asarray(score(memory, jnp.arange(LAYERS)))
        np.testing.assert_array_equal(found, [slow.scores(at) for at in range(LAYERS)])
    tied = learned.scores(weights, memory, jnp.arange(LAYERS))
    free = learned.scores(weights._replace(tied=weights.tied._replace(bias=np.zeros((1, 1), np.int32))), memory,
                          jnp.arange(LAYERS))  # fmt: skip
    assert (np.asarray(free) != np.asarray(tied)).any()


def test_odds_keep_the_order_and_are_positive() -> None:
    scores = np.array([-(1 << 20), -65536, -4096, -1, 0, 1, 2048, 4096, 65535])
    odds = np.asarray(learned.odds(jnp.asarray(scores, jnp.int32)))
    assert (odds > 0).all() and (np.diff(odds[1:]) > 0).all() and odds[0] == odds[1]
    assert odds[4] == 1.0 and odds[7] == 2.0
    assert odds.tolist() == [float(trained.odds(int(s))) for s in scores]


@pytest.mark.parametrize("name", ["evictor", "prefetcher"])
def test_the_package_brings_weights_and_their_card(name: str) -> None:
    weights = learned.load(name)
    card = json.loads((learned.DATA / f"{name}.json").read_text(encoding="utf-8"))
    assert weights.tied.bias.shape == (card["trace"]["layers"], card["trace"]["experts"]) == (24, 32)
    assert not set(card["category"]["train"]) & set(card["category"]["test"])
    assert sum(path.stat().st_size for path in learned.DATA.iterdir()) < 5 << 20


def test_a_bad_checkpoint_is_named(checkpoints: dict[str, str], tmp_path: Path) -> None:
    trace = recorded()
    with pytest.raises(SpecmdError, match=r"nothing\.npz: No such file"):
        run(trace, eviction="learned", capacity="6 slots", checkpoint="nothing.npz")
    with pytest.raises(SpecmdError, match="expected weights of the evictor, found those of the prefetcher"):
        run(trace, eviction="learned", capacity="6 slots", checkpoint=checkpoints["prefetcher"])
    bad = tmp_path / "bad.npz"
    bad.write_text("no npz")
    with pytest.raises(SpecmdError, match=r"bad\.npz: not a zip, expected an npz of a trained predictor"):
        run(trace, eviction="learned", capacity="6 slots", checkpoint=str(bad))
    arrays = {name: array for name, array in learned.flatten(drawn()).items() if name != "tied/wave/out"}
    np.savez(bad, **{"head": np.array("evictor"), **arrays})  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecmdError, match="no array 'tied/wave/out'"):
        learned.load("evictor", str(bad))
    weights = drawn()
    huge = weights._replace(free=weights.free._replace(hidden=np.full_like(weights.free.hidden, 32767)))
    with pytest.raises(SpecmdError, match=r"free/hidden can sum to \d+, expected less than 16777216"):
        learned.checked(huge, "here")


def test_examples_see_what_the_scan_sees() -> None:
    """Offline features and wavefronts equal the policy's own tables, at every visit."""
    trace = recorded()
    found = features.examples(trace, np.arange(trace.requests))
    rows = np.flatnonzero(found.request == 1)
    demand, mass = features.decoded(trace, np.array([1]))
    memory = history.blank(trace.layers, trace.experts)
    after = features.batch(found, features.labels(found, "evictor", 0.5), rows, "evictor")
    ahead = features.batch(found, features.labels(found, "prefetcher", 0.5), rows, "prefetcher")
    see = jax.jit(seen_by)
    flat_layer = np.arange(trace.layers * trace.experts) // trace.experts

    def seen_at(given: features.Batch, n: int, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        topic = np.where(current, given.topic[n], given.topic_before[n])
        return np.where(current, given.wave[n], given.wave_before[n]), topic

    for n in range(len(demand)):
        for layer in range(trace.layers):
            for given, current in ((ahead, flat_layer < layer), (after, flat_layer <= layer)):
                if given is after:
                    memory = see(memory, layer, demand[n, layer], mass[n, layer])
                row = jax.tree.map(lambda table, at=layer: table[at], memory)
                np.testing.assert_array_equal(given.seen[n, layer], history.features(row))
                wave, topic = seen_at(given, n, current)
                np.testing.assert_array_equal(wave, history.wave(memory.last))
                np.testing.assert_array_equal(topic, history.topic(memory.use))
    np.testing.assert_array_equal(ahead.label, demand)


def test_labels_are_the_soonness_of_the_next_use() -> None:
    trace = recorded(requests=3)
    found = features.examples(trace, np.arange(3))
    soon = features.labels(found, "evictor", 0.5)
    for n in range(len(soon)):
        later = np.flatnonzero(found.request == found.request[n])
        later = later[later > n]
        for layer, expert in ((0, 0), (1, 3), (2, 5)):
            uses = later[found.demand[later, layer, expert]]
            assert soon[n, layer, expert] == np.float32(0.5 ** (uses[0] - n - 1) if len(uses) else 0)


@pytest.mark.parametrize("head", learned.HEADS)
def test_stored_integers_say_what_was_trained(head: str, tmp_path: Path) -> None:
    trace = recorded(tokens=30)
    found = features.examples(trace, np.arange(trace.requests))
    settings = replace(TOY, head=head)
    model = device.model(settings)
    given = features.batch(found, features.labels(found, head, 0.8), np.arange(1, 17), head)
    params = model.init(jax.random.key(3), given)["params"]
    free, tied = model.apply({"params": params}, given)
    weights = predictor.whole(params)
    score = jax.jit(lambda memory, row: learned.scores(weights, memory, row)[0] / 4096)
    see = jax.jit(seen_by)
    memory = history.blank(trace.layers, trace.experts)
    demand, mass = features.decoded(trace, np.array([0]))
    worst = 0.0
    for n, layer in np.ndindex(17, trace.layers):
        before = memory
        memory = see(memory, layer, demand[n, layer], mass[n, layer])
        if n:
            now = score(memory if head == "evictor" else before, jnp.array([layer]))
            worst = max(worst, float(np.abs(now - np.asarray(tied)[n - 1, layer]).max()))
    assert worst < 0.02
    assert np.abs(np.asarray(free) - np.asarray(tied)).max() > 0.1


def test_an_average_says_the_mean_of_what_its_parts_say() -> None:
    parts = [drawn(seed) for seed in (4, 5)]
    memory = history.blank(LAYERS, EXPERTS)
    rng = np.random.default_rng(2)
    for visit in range(9):
        demand = rng.random(EXPERTS) < 0.4
        memory = seen_by(memory, visit % LAYERS, demand, rng.random(EXPERTS).astype(np.float32))
    rows = jnp.arange(LAYERS)
    first, second, both = (learned.scores(w, memory, rows) / 4096 for w in (*parts, training.averaged(parts)))
    # halves of whole steps are rounded
    assert np.abs(both - (first + second) / 2).max() < 0.02 * np.abs(first - second).max()
    smaller = parts[1]._replace(tied=parts[1].tied._replace(bias=np.zeros((1, 1), np.int32)))
    with pytest.raises(SpecmdError, match="same layers and experts"):
        training.averaged([parts[0], smaller])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_online_numbers_equal_the_reference(scope: str) -> None:
    numbers = {
        "eviction": {"fade": 0.4, "rate": 0.7},  # large steps reach the ends of the weights
        "prefetch": {"rate": 0.0625},
        "selection": {"count": 2.0},
    }
    budget = 420_000 if scope == "global" else np.array([130_000, 80_000, 125_000, 95_000])
    compare(small_trace(2, tokens=40), Mix.of("online", "online", numbers=numbers), budget, horizon=3)


def test_online_learns_what_a_trace_does() -> None:
    """Token after token the same experts in turn: frequency and recency cannot tell them apart, pairs can."""
    trace = recorded(tokens=120, requests=1)
    turn = np.arange(120)[:, None, None] % 3 * 2 + np.arange(2)
    trace = replace(trace, expert_ids=np.broadcast_to(turn, trace.expert_ids.shape).astype(trace.expert_ids.dtype))
    cell: dict[str, Any] = {"capacity": "66.7%", "scope": "layer", "hardware": None}
    rates = {name: run(trace, eviction=name, **cell).hit_rate for name in ("lru", "lfu", "online")}
    assert rates["online"] > 0.4 > rates["lru"]


def test_training_learns_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    trace = recorded(tokens=40, requests=8)
    said: list[str] = []
    whole = training.fit(trace, TOY, tmp_path / "whole", said.append)
    assert len(said) == TOY.epochs + 1 and "tokens/s" in said[-1] and "s left" in said[-2]
    assert said[0].startswith("learns from all ") and "left out" not in said[0]
    cut = tmp_path / "cut"
    script = (
        "from test_learned import TOY, recorded\n"
        "from specmd_jax.learn import training\n"
        f"training.fit(recorded(tokens=40, requests=8), TOY, Path({str(cut)!r}), report)\n"
    )
    run_until("epoch 2", script)
    again: list[str] = []
    resumed = training.fit(trace, TOY, cut, again.append)
    assert again[1] == "goes on after epoch 2 of 3" and len(again) == 3
    for name, array in learned.flatten(whole.weights).items():
        np.testing.assert_array_equal(array, learned.flatten(resumed.weights)[name], name)
    assert whole.scores == resumed.scores
    start = float(said[1].split("validation ")[1].split(";")[0])
    assert whole.scores["validation_loss"] < start
    with pytest.raises(SpecmdError, match="seed is 1 here but 0 there"):
        training.fit(trace, replace(TOY, seed=1), cut, again.append)
    with pytest.raises(SpecmdError, match="train"):  # parts that are given are part of a run
        training.fit(trace, TOY, cut, again.append, whole.parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "evicter"}, "did you mean 'evictor'"),
        ({"split": "token"}, "unknown unit of a split 'token'"),
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"fade": 1.0}, "fade is 1.0"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"split": "category"}, "meta names no category of each request"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError, match=message):
        training.fit(recorded(), replace(TOY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_splits_keep_groups_together() -> None:
    names = ["a", "b", "a", "c", "d", "d", "e", "f"]
    trace = recorded(requests=8)
    trace = replace(trace, meta={**trace.meta, "requests": [{"category": name, "dataset": "x"} for name in names]})
    parts = split(trace, "category", 3)
    groups = [{names[r] for r in part} for part in parts]
    assert sorted(np.concatenate(parts)) == list(range(8)) and all(groups)
    assert sum(map(len, groups)) == len(set(names))
    with pytest.raises(SpecmdError, match="1 groups by dataset, expected at least 3"):
        split(trace, "dataset")


def test_the_interval_of_a_ratio_holds_its_value() -> None:
    parts, wholes = np.array([1.0, 2, 3, 4]), np.array([2.0, 4, 6, 8])
    assert ratio(parts, wholes) == (0.5, 0.5, 0.5)
    value, low, high = ratio(np.array([1.0, 0, 3, 4]), wholes)
    assert value == 0.4 and low < value < high


def test_the_command_averages_what_was_trained_alike(tmp_path: Path) -> None:
    files = []
    for seed, groups in ((0, ["a"]), (1, ["a"]), (2, ["b"])):
        card = {
            "head": "evictor",
            "trace": {"model": "m"},
            "category": {"train": groups},
            "scores": {"test_loss": seed},
        }
        files.append(str(tmp_path / f"{seed}.npz"))
        training.export(
            Path(files[-1]), drawn(seed), "evictor", card | {"settings": {"split": "category", "seed": seed}}
        )
    train_evictor.main(["--average", ",".join(files[:2]), "--out", str(tmp_path / "out")])
    made = learned.load("evictor", str(tmp_path / "out" / "evictor.npz"))
    assert made.tied.wave.out.shape[-1] == sum(drawn(seed).tied.wave.out.shape[-1] for seed in (0, 1))
    card = json.loads((tmp_path / "out" / "evictor.json").read_text())
    assert [one["settings"]["seed"] for one in card["averaged"]] == [0, 1] and "scores" not in card
    with pytest.raises(SpecmdError, match=r"2\.npz: its category is not that of .*0\.npz"):
        train_evictor.main(["--average", ",".join(files[::2]), "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
