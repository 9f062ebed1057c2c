"""Training: the loops do what the network says, no request is lost to memory, and one command trains all heads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.learned import HEADS, Head, TrainConfig, TrainHeadsConfig
from experiments import train
from specmd_jax.errors import SpecmdError
from specmd_jax.learn import device, examples, host, predictor, threads, training
from specmd_jax.learn.examples import EXAMPLE_BYTES, Windows
from specmd_jax.learn.settings import Settings
from specmd_jax.policies import trained as learned
from specmd_jax.trace import save_trace, synthesize
from specmd_jax.types import Trace

# shapes of tests/test_learned.py, so that programs are shared
TOY = Settings("evictor", split="request", epochs=2, batch=16, hidden=4, width=3, topics=2, every=1, drop=0.0)


def recorded(tokens: int = 40, requests: int = 8, prompt: int = 0) -> Trace:
    return synthesize(
        layers=3, experts=6, top_k=2, tokens=tokens, requests=requests, prompt_tokens=prompt, with_logits=False
    )


@pytest.fixture(scope="module")
def found() -> examples.Examples:
    return examples.examples(recorded(), np.arange(8))


ROWS = np.random.default_rng(3).permutation(320)[:16]


def engine(found: examples.Examples, settings: Settings, lone_every: int = 1) -> host.Host:
    return host.Host(device.first_params(found, settings), settings, 2, lone_every)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.parametrize("head", learned.HEADS)
def test_the_loops_have_the_losses_and_slopes_of_the_network(found: examples.Examples, head: str) -> None:
    settings = replace(TOY, head=head)
    given = examples.batch(found, examples.labels(found, head, settings.fade), ROWS, head)
    loops, network = engine(found, settings), device.model(settings)
    start = loops.start().weights

    def objective(params: Any) -> jax.Array:
        free, tied = device.logits(network, params, given)
        return predictor.loss(free, given.label) + predictor.loss(tied, given.label)

    params = jax.tree.map(jnp.asarray, loops.params(start))
    expected, slope = jax.jit(jax.value_and_grad(objective))(params)
    each, free = loops.losses(start, found, ROWS)
    np.testing.assert_allclose(each.mean() + free, expected, rtol=1e-5)
    mine = flat(loops.slopes(start, found, ROWS))
    for name, array in flat(slope).items():
        np.testing.assert_allclose(mine[name], array, rtol=1e-4, atol=1e-6 * np.abs(array).max(), err_msg=name)
        assert np.abs(array).max() > 0, name


def test_an_update_is_that_of_adamw(found: examples.Examples) -> None:
    loops = engine(found, TOY)
    state, rate = loops.start(), 0.01
    optimizer = optax.adamw(rate, b2=host.FADE_SQUARES, weight_decay=TOY.weight_decay)
    params = jax.tree.map(jnp.array, loops.params(state.weights))
    memory = optimizer.init(params)
    for step in range(3):
        slope = jax.tree.map(jnp.array, loops.slopes(state.weights, found, ROWS, step))
        change, memory = optimizer.update(slope, memory, params)
        params = optax.apply_updates(params, change)
        state, _ = loops.update(state, found, ROWS, rate)
        for name, array in flat(params).items():
            np.testing.assert_allclose(flat(loops.params(state.weights))[name], array, atol=2e-6, err_msg=name)
    assert int(state.step) == 3


def test_layers_take_turns_and_make_up_the_whole(found: examples.Examples) -> None:
    """With `every`, the slopes of as many updates are, on average, those of all tokens at all layers."""
    start = engine(found, TOY).start().weights
    whole = flat(engine(found, TOY).slopes(start, found, ROWS))
    turns = engine(found, replace(TOY, every=4))
    parts = [flat(turns.slopes(start, found, ROWS, step)) for step in range(4)]
    for name, array in whole.items():
        mean = np.mean([part[name] for part in parts], axis=0)
        np.testing.assert_allclose(mean, array, rtol=1e-4, atol=1e-6, err_msg=name)
        assert (parts[0][name] != parts[1][name]).any(), name
    lone = flat(engine(found, TOY, lone_every=2).slopes(start, found, ROWS))
    assert all(np.array_equal(lone[name], x) == ("free" not in name) for name, x in whole.items())


def test_inputs_are_hidden_by_seed_and_update(found: examples.Examples) -> None:
    loops = engine(found, replace(TOY, drop=0.5))
    start = loops.start().weights
    first, again, later = (flat(loops.slopes(start, found, ROWS, step))["['wave']['into']"] for step in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, later)
    kept = np.count_nonzero(first) / np.count_nonzero(
        flat(engine(found, TOY).slopes(start, found, ROWS))["['wave']['into']"]
    )
    assert 0.3 < kept < 1


def test_the_number_of_cores_changes_no_bit(found: examples.Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for cores in (1, 2, 3):
        monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
        loops = engine(found, replace(TOY, drop=0.1))
        state = loops.start()
        for step in range(3):
            state, _ = loops.update(state, found, (ROWS + step) % 320, 0.01)
        results.append(state.weights)
        drawn = examples.examples(recorded(), np.arange(8))
        assert all(np.array_equal(x, y) for x, y in zip(found, drawn, strict=True))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_an_error_in_a_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 2)

    def work(first: int, last: int) -> None:
        if first:
            raise ValueError("the second half")

    with pytest.raises(ValueError, match="the second half"):
        threads.over(4, work)


def window_of(requests: int, tokens: int = 40) -> int:
    return requests * tokens * 3 * 6 * EXAMPLE_BYTES


def test_windows_give_what_memory_would(found: examples.Examples) -> None:
    """Batch by batch the same bits as from examples of all requests at once, whether windows are kept or not."""
    requests = np.arange(8)
    kept, streamed = (Windows(recorded(), requests, window_of(3), 5, keep) for keep in (True, False))
    assert len(kept) == 3 and sorted(np.concatenate(kept.parts)) == list(requests) and sum(kept.tokens) == 320
    assert kept[1] is kept[1] and streamed[1] is not streamed[1]
    for epoch in range(2):
        seen: list[tuple[int, int]] = []
        pairs = zip(kept.shuffled(16, 1, epoch), streamed.shuffled(16, 1, epoch), strict=True)
        for (one, rows), (other, same) in pairs:
            np.testing.assert_array_equal(rows, same)
            position = rows % 40  # of a token in its request; all have 40
            everything = one.request[rows] * 40 + position
            for head in learned.HEADS:
                batches = [
                    examples.batch(held, examples.labels(held, head, 0.8), at, head)
                    for held, at in ((one, rows), (other, same), (found, everything))
                ]
                for name, *tables in zip(batches[0]._fields, *batches, strict=True):
                    np.testing.assert_array_equal(tables[0], tables[1], name)
                    np.testing.assert_array_equal(tables[0], tables[2], name)
            seen += zip(one.request[rows].tolist(), position.tolist(), strict=True)
        assert set(seen) == {(r, n) for r in range(8) for n in range(40)}  # every token of every request
        assert len(seen) == 16 * kept.steps(16)
    told = [new for _, _, new in streamed.in_turn(16)]
    assert sum(told) == 320 and max(told) == 16


def test_streaming_trains_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, settings, said = recorded(), replace(TOY, window_bytes=window_of(2), drop=0.1, every=2), list[str]()
    heard: list[tuple[int, int]] = []
    streamed = training.fit(trace, settings, tmp_path / "a", said.append, progress=lambda *x: heard.append(x))
    assert "in 3 windows" in said[0] and f"all {len(streamed.parts.train)} training requests" in said[0]
    assert heard[-1][0] == heard[-1][1] and [done for done, _ in heard] == sorted(done for done, _ in heard)
    monkeypatch.setattr(training, "Windows", lambda *given: Windows(*given, keep=True))
    kept = training.fit(trace, settings, tmp_path / "b", said.append)
    for name, array in learned.flatten(streamed.weights).items():
        np.testing.assert_array_equal(array, learned.flatten(kept.weights)[name], name)
    assert streamed.scores == kept.scores


def test_requests_without_decoded_tokens_are_counted(tmp_path: Path) -> None:
    trace = recorded(tokens=12, prompt=4)
    prompts = trace.prompt_lengths.copy()
    prompts[2:4] = 12
    trace = replace(trace, prompt_lengths=prompts)
    parts = training.Split(np.arange(5), np.array([5]), np.array([6, 7]))
    said: list[str] = []
    done = training.fit(trace, TOY, tmp_path, said.append, parts)
    assert "2 requests without decoded tokens are left out" in said[0]
    assert done.left_out == {"train": 2, "validation": 0, "test": 0}
    assert training.card(trace, TOY, done)["left_out"] == done.left_out
    with pytest.raises(SpecmdError, match="none of 2 requests has decoded tokens"):
        Windows(trace, np.array([2, 3]), 1)


def test_jax_trains_where_it_is_asked_to(tmp_path: Path) -> None:
    settings = replace(TOY, engine="jax", every=4)
    done = training.fit(recorded(), settings, tmp_path / "run", lambda line: None)
    loops = training.fit(recorded(), replace(TOY, engine="host"), tmp_path / "host", lambda line: None)
    assert training.resolved(settings).every == 1 and training.resolved(replace(settings, batch=0)).batch == 256
    # the same batches and rates; only which histories teach the weights of histories differs
    assert done.scores["validation_loss"] == pytest.approx(loops.scores["validation_loss"], abs=0.01)
    again: list[str] = []
    resumed = training.fit(recorded(), settings, tmp_path / "run", again.append)
    assert again[-1] == "goes on after epoch 2 of 2" and resumed.scores == done.scores
    with pytest.raises(SpecmdError, match=r"validation is 0\.5 and test is 0\.5, expected shares that leave some"):
        Settings("evictor", validation=0.5, test=0.5).check()
    with pytest.raises(SpecmdError, match="unknown engine of training 'gpu'"):
        replace(TOY, engine="gpu").check()


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[str]:
    save_trace(recorded(), tmp_path / "mine.npz")
    yield str(tmp_path / "mine.npz")


def test_one_command_trains_all_heads(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    given = ["--smoke", "--trace", mine, "--split", "request", "--out", str(out)]
    train.main(given)
    told = capsys.readouterr().out
    assert "prefetcher: learns from all" in told and "evictor: epoch 2 of 2" in told and "s left" in told
    assert "reads 8 of 8 requests, 192 of 320 tokens" in told
    manifest = json.loads((out / "manifest.json").read_text())
    for head in learned.HEADS:
        assert learned.load(head, str(out / f"{head}.npz")).tied.bias.shape == (3, 6)
        about = manifest["heads"][head]
        assert about["not_read"] == {"requests": 0, "tokens": 128} and about["without_decoded_tokens"]["train"] == 0
        assert about["settings"]["settings"]["split"] == "request" and about["scores"]["test_loss"] > 0
    with pytest.raises(SpecmdError, match=r"manifest\.json already exists"):
        train.main(given)
    # as if it had been ended while the second head was under way: the first one's weights are its own
    (out / "manifest.json").unlink()
    (out / "evictor.npz").unlink()
    train.main(given)
    assert (out / "evictor.npz").exists() and (out / "manifest.json").exists()
    (out / "manifest.json").unlink()
    with pytest.raises(SpecmdError, match=r"prefetcher\.npz already exists"):
        train.main([*given, "--epochs", "3"])


def test_a_further_head_joins_by_one_entry(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Config(TrainConfig):
        def of(self, run: TrainHeadsConfig) -> Any:
            return replace(self, trace=run.trace, requests=run.epochs)

    monkeypatch.setitem(HEADS, "third", Head(Config(), f"{__name__}:_third"))
    train.main(["--trace", mine, "--heads", "third", "--epochs", "7", "--out", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["heads"]["third"]["trace"] == mine and manifest["heads"]["third"]["requests"] == 7
    with pytest.raises(SpecmdError, match="unknown head 'fourth'"):
        train.main(["--heads", "fourth"])


def _third(config: TrainConfig, out: Path) -> dict[str, Any]:
    assert out.is_dir()
    return {"trace": config.trace, "requests": config.requests}
