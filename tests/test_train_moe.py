"""The training of a small model: the grouped product, the same function as inference, batches, times, going on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.train_moe import SMOKE
from experiments import pack_moe
from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import weights as checkpoint
from specmd_jax.moe.training import corpus, grouped, held_out, network, parameters, schedule
from specmd_jax.moe.training.batches import Batches
from specmd_jax.moe.training.corpus import Data
from specmd_jax.moe.training.export import export
from specmd_jax.moe.training.held_out import cut
from specmd_jax.moe.training.loop import Finished, Limits, Point, fit
from specmd_jax.reference import held_out_texts
from specmd_jax.report.reader import read_rows
from specmd_jax.report.rows import number

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    rng = np.random.default_rng(0)
    words = ["river", "stone", "walks", "under", "light", "seven", "12", "34", "returns", "value"]

    def text(begin: str, count: int) -> str:
        return "\n\n".join(begin + " ".join(rng.choice(words, 60)) for _ in range(count))

    texts = {"maths": text("Question: ", 40), "dialogue": text("user: ", 40) + "\n\nuser: 春眠不覺曉"}
    return corpus.prepare(texts, tmp_path_factory.mktemp("data"), 300, lambda line: None)


@pytest.mark.parametrize(("experts", "rows"), [(4, 8), (1, 16)])
def test_the_grouped_product_is_that_of_every_pair(experts: int, rows: int) -> None:
    tokens, top_k, width = 24, min(2, experts), 6
    keys = jax.random.split(jax.random.key(0), 4)
    h = jax.random.normal(keys[0], (tokens, width))
    matrix = jax.random.normal(keys[1], (experts, width, width))
    scale = jax.random.normal(keys[2], (tokens, top_k, width))
    # uneven: most tokens choose expert 0
    logits = jax.random.normal(keys[3], (tokens, experts)).at[:, 0].add(2.0)
    ids = jax.lax.top_k(logits, top_k)[1]

    def by_groups(h: jax.Array, matrix: jax.Array) -> jax.Array:
        plan = grouped.plan(ids, experts, rows)
        x = grouped.dispatch(h, plan).reshape(-1, rows, width)
        y = grouped.product(x, grouped.blocks_of(matrix, plan.expert)).reshape(-1, width)
        return (scale * grouped.collect(y, plan)).sum()

    def by_pairs(h: jax.Array, matrix: jax.Array) -> jax.Array:
        return (scale * jnp.einsum("nd,nkod->nko", h, matrix[ids])).sum()

    for got, wanted in zip(*(jax.value_and_grad(f, (0, 1))(h, matrix) for f in (by_groups, by_pairs)), strict=True):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_training_computes_what_inference_does(data: Data, dense: bool) -> None:
    settings = replace(SMOKE, dense=dense)
    cfg = moe.from_hf(settings.hf(data.vocabulary), "float32")
    weights = parameters.initial(cfg, jax.random.key(1))
    weights["layers"]["query_norm"] *= 1.5
    tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, cfg.vocabulary)
    x, routed = network.hidden(cfg, weights, tokens, rows=8)
    got = network.logits(cfg, weights, x.reshape(-1, cfg.width))

    params, stacks = parameters.served(cfg, weights)
    net, start = moe.build(cfg), jnp.zeros(2, jnp.int32)
    stream, _, routing = jax.jit(moe.forward, static_argnums=0)(
        net, params, stacks, tokens, moe.init_cache(cfg, 2, 16), start
    )
    wanted = net.head(params["head"], stream.reshape(-1, cfg.width))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(routed.ids, routing.ids.reshape(routed.ids.shape))
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == parameters.total_weights(cfg)


def test_documents_are_held_out_by_position_and_text_comes_back(data: Data) -> None:
    from specmd_jax.moe.checkpoint.text import open_tokenizer

    tokenizer = open_tokenizer(data.folder)
    one = data.domains["dialogue"].held_out
    text = tokenizer.decode(data.held_out[one.begin : one.end].tolist())
    assert text.endswith("user: 春眠不覺曉") and one.documents >= 1
    assert tokenizer.encode("7 stones").ids[0] == 0
    told = corpus.open_data(data.folder)
    assert told.domains == data.domains and told.train_tokens == len(data.train)
    texts = corpus.documents("maths", "Question: a\n\nQuestion: b\n\nQuestion: a\n")
    assert texts == ["Question: a", "Question: b"]
    with pytest.raises(SpecmdError, match="1 documents, expected at least 2"):
        corpus.split(texts[:1])
    with pytest.raises(SpecmdError, match="no data to train on there"):
        corpus.open_data(data.folder / "nowhere")


def test_a_batch_depends_on_seed_and_step_alone_and_all_text_is_read_first(data: Data) -> None:
    batches, again = Batches(data, 16, 4, 3), Batches(data, 16, 4, 3)
    assert [again.starts(step).tolist() for step in (5, 2)] == [batches.starts(step).tolist() for step in (5, 2)]
    part = data.domains["maths"].train
    seen = [
        int(start)
        for step in range(400)
        for start, domain in zip(batches.starts(step), batches.domains(step), strict=True)
        if list(data.domains)[domain] == "maths"
    ]
    once = (part.end - part.begin - 1) // 16 - 1
    assert len(set(seen[:once])) == once and len(seen) > once
    assert min(seen) >= part.begin and max(seen) + 17 <= part.end
    shares = np.bincount(np.concatenate([batches.domains(step) for step in range(300)]))
    assert shares.tolist() == [1000, 200]  # 10 and 2 of every 12


def test_the_rate_ends_in_time() -> None:
    settings = replace(SMOKE, warmup_steps=10, decay_share=0.5)
    rates = [float(schedule.learning_rate(settings, jnp.int32(step), jnp.int32(100))) for step in (0, 9, 40, 75, 99)]
    np.testing.assert_allclose(np.array(rates) / settings.learning_rate, [0.1, 1, 1, 0.5, 0.02], rtol=1e-5)
    cosine = replace(settings, schedule="cosine")
    assert float(schedule.learning_rate(cosine, jnp.int32(100), jnp.int32(100))) < 1e-9
    steps = schedule.fitting_steps(settings, 12, left_s=50.0, step_s=0.1, evaluation_s=1.0)
    assert steps == 12 + (50 - 4) * 0.95 / 0.1 // 4 * 4
    with pytest.raises(SpecmdError, match="no 10 steps fit"):
        schedule.fitting_steps(settings, 0, left_s=4.5, step_s=0.1, evaluation_s=1.0)


def test_windows_of_held_out_text_predict_every_token_once() -> None:
    windows, real = cut(np.arange(1, 12, dtype=np.uint16), 4)
    assert windows[:, 1:][real].tolist() == list(range(2, 12))
    assert windows[1].tolist() == [5, 6, 7, 8, 9]


class Killed(Exception):
    pass


def run(data: Data, folder: Path, until: int | None = None, **limits: float) -> Finished:
    def hear(point: Point) -> None:
        if point.step == until:
            raise Killed

    return fit(data, SMOKE, folder, Limits(time.perf_counter(), **limits), hear, lambda line: None)


def test_a_run_that_was_ended_goes_on_bit_for_bit_and_its_export_is_read_and_packed(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(data, tmp_path / "whole")
    assert whole.done and int(whole.state.step) == SMOKE.steps
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", until=8)
    stopped = run(data, tmp_path / "killed", process_s=0.5)
    assert not stopped.done and int(stopped.state.step) == 8
    went_on = run(data, tmp_path / "killed")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(went_on), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(SpecmdError, match="seed is 1 here but 0 there"):
        fit(data, replace(SMOKE, seed=1), tmp_path / "whole", Limits(0.0), lambda point: None, lambda line: None)

    folder = export(tmp_path / "model", SMOKE, whole.best, data, "float32", shard_bytes=1 << 16)
    assert len(list(folder.glob("*.safetensors"))) > 1
    cfg, params, store = checkpoint.load(folder)
    wanted = parameters.served(cfg, whole.best)
    for a, b in zip(jax.tree.leaves((params, store)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)

    # what packing it costs is one command, which scores its text as training does
    out = tmp_path / "out"
    given = ("--checkpoint", str(folder), "--data", str(data.folder), "--windows", "99", "--tokens", "32")
    pack_moe.main([*given, "--plain", "--out", str(out)])
    scored = held_out.scores(cfg, SMOKE, whole.best, data, "xla")
    for row in read_rows(out):
        name = str(row["domain"])
        assert number(row, "bits_per_byte") == pytest.approx(scored[name].bits_per_byte, rel=0.02)  # whole windows only
        assert number(row, "bits_per_byte") != row["packed_bits_per_byte"]
        assert number(row, "packed_bits_per_byte") == pytest.approx(number(row, "bits_per_byte"), rel=0.02)
    assert "packing costs" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"packed", "plain", "rows.csv", "manifest.json"}
    assert held_out_texts(out / "packed").keys() == data.domains.keys()
    packed, plain = (checkpoint.load(out / name)[1:] for name in ("packed", "plain"))
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
