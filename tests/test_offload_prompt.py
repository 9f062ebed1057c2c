"""`experiments.offload` with a prompt: text in pieces, the numbers behind it, memory to the byte, and bad input."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false
from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import fields

import jax
import numpy as np
import pytest
from moe_cases import checkpoint_tensors, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import experiments.offload
from configs.completion import Completion
from experiments.common.options import shown
from experiments.offloading import completed
from experiments.offloading.completed import make_plan
from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import text, weights
from specmd_jax.moe.checkpoint.folder import SINGLE, load_config
from specmd_jax.moe.fused import engine as fused
from specmd_jax.moe.layerwise import engine as layerwise
from specmd_jax.moe.measure import predict
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime import memory, store
from specmd_jax.moe.runtime.decider import Decision
from specmd_jax.moe.runtime.policy import make_policy
from specmd_jax.moe.runtime.run import Run
from specmd_jax.replay.totals import FETCHED
from specmd_jax.report.reader import read_rows
from specmd_jax.report.studies import redraw
from specmd_jax.trace import load_trace, synthesize
from specmd_jax.types import PREFILL

SHAPE = {"num_hidden_layers": 2, "vocab_size": 320}
SENTENCE = "héllo wörld ☃ and 日本"


def byte_tokenizer():
    """Every byte is a token: no character beyond ASCII comes in one piece."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def word_tokenizer():
    """Words with their space before them, which the first of a text loses."""
    words = ["<unk>", *(f"▁{word}" for word in ("the", "cat", "sat", "on", "mat"))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save(path, "olmoe", checkpoint_tensors("olmoe", **SHAPE), **SHAPE)
    byte_tokenizer().save(str(path / text.TOKENIZER))
    return path


def resident(folder, prompt, steps):
    """The all-resident model's tokens."""
    cfg, params, stacks = weights.load(folder)
    return moe.generate(cfg, params, stacks, np.array([prompt]), steps).tokens[0].tolist()


def complete(capsys, *options):
    experiments.offload.main([*map(str, options)])
    return capsys.readouterr()


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 4, 7])
@pytest.mark.parametrize(
    ("tokenizer", "sentence"), [(byte_tokenizer(), SENTENCE), (word_tokenizer(), "the cat sat on the mat the cat")]
)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, sentence, before):
    ids = tokenizer.encode(sentence).ids
    before = min(before, len(ids) - 2)
    pieces = text.Pieces(tokenizer, ids[:before])
    told = [pieces(token) for token in ids[before:]]
    assert all("\ufffd" not in piece for piece in told) and sum(map(bool, told)) > 1
    assert tokenizer.decode(ids[:before]).rstrip("\ufffd") + "".join(told) == tokenizer.decode(ids) == sentence
    assert pieces.rest() == ""


def test_half_a_character_is_shown_in_the_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a☃").ids[:-1]
    pieces = text.Pieces(tokenizer)
    assert [pieces(token) for token in ids] == ["a", "", ""] and pieces.rest() == "\ufffd" and pieces.rest() == ""


def test_bytes_that_make_no_character_are_shown_in_a_while():
    tokenizer = byte_tokenizer()
    broken = tokenizer.encode("☃").ids[1:2] * 40
    pieces = text.Pieces(tokenizer)
    told = [pieces(token) for token in broken]
    assert sum(map(len, told)) == 32 and pieces.rest() == "\ufffd" * 8


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 5}, {7, 9}),
        ({}, {"eos_token_id": 5}, {5}),
        (None, {"eos_token_id": [5, 6]}, {5, 6}),
        ({"eos_token_id": None}, {}, set()),
    ],
)
def test_tokens_that_end_a_text(tmp_path, generation, config, expected):
    if generation is not None:
        (tmp_path / text.GENERATION).write_text(json.dumps(generation))
    (tmp_path / text.CONFIG).write_text(json.dumps(config))
    assert text.end_tokens(tmp_path) == expected


@pytest.mark.parametrize("found", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1.5]}', "{"])
def test_tokens_that_end_nothing(tmp_path, found):
    (tmp_path / text.GENERATION).write_text(found)
    with pytest.raises(SpecmdError, match=r"generation_config.json: (eos_token_id is .*, expected|.*, expected JSON)"):
        text.end_tokens(tmp_path)


COMPILED = [0]
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **more: COMPILED.__setitem__(0, COMPILED[0] + name.endswith("backend_compile_duration"))
)


@pytest.fixture
def compiles(monkeypatch):
    """How many programs were compiled before each token was printed, and before the end."""
    counts = []

    class Watching(completed.Printer):
        def __call__(self, request, step, token):
            counts.append(COMPILED[0])
            return super().__call__(request, step, token)

        def finish(self):
            counts.append(COMPILED[0])
            super().finish()

    monkeypatch.setattr(completed, "Printer", Watching)
    return counts


# ---- the command -----------------------------------------------------------------------------------------------------


def numbers(out):
    """The figures of the block by their name: (measured, simulated)."""
    rows = re.findall(
        r"^(time to the first|tokens per|hit rate|copied per)[^)]*\) +(\S+).*?  +(\S+)", out, re.MULTILINE
    )
    return {name: (measured, simulated) for name, measured, simulated in rows}


def test_a_text_is_completed_as_the_resident_model_does_and_its_numbers_follow(folder, capsys, tmp_path, compiles):
    results = tmp_path / "results"
    told = complete(
        capsys, "--model", folder, "--prompt", SENTENCE, "--steps", 12, "--capacity", "9slots", "--out", results
    )
    assert len(compiles) == 13 and len(set(compiles)) == 1 and compiles[0] > 0  # all was compiled before
    tokenizer = byte_tokenizer()
    prompt = tokenizer.encode(SENTENCE).ids
    expected = resident(folder, prompt, 12)
    whole = tokenizer.decode([*prompt, *expected])
    assert told.out.startswith(f"{whole[len(SENTENCE) :]}\n\n{folder.name} (float32), layerwise engine, lru\n")
    assert f"{len(prompt)} tokens of prompt, 12 new (as many as asked for)" in told.out
    (row,) = read_rows(results)
    found, trace = numbers(told.out), load_trace(results / "trace.npz")
    assert found["time to the first"][0] == f"{1e3 * row['ttft_s']:,.1f}"
    assert found["tokens per"] == tuple(f"{1 / row[name]:,.2f}" for name in ("tpot_s", "simulated_tpot_s"))
    assert found["hit rate"] == (f"{100 * row['hit_rate']:.1f}",) * 2
    assert row["hit_rate"] == row["simulated_hit_rate"] and row["events_equal"] is True
    assert row["copy_bytes_per_token"] == pytest.approx((1 - row["hit_rate"]) * 2 * 3 * row["expert_bytes"])
    assert (row["slots"], row["experts"], trace.lengths.tolist()) == (9, 16, [len(prompt) + 11])
    assert "experts in the cache: 9 of 16 (56.2 %)" in told.out
    assert redraw(results).startswith(told.out[told.out.index("\n\n") + 2 :].rstrip())
    with pytest.raises(SpecmdError, match="already exists"):
        complete(capsys, "--model", folder, "--prompt", "x", "--out", results)


def test_the_fused_engine_streams_ids_within_a_memory_and_heeds_the_end_token(
    folder, capsys, monkeypatch, tmp_path, compiles
):
    monkeypatch.chdir(tmp_path)
    ids = [5, 6, 7, 8]
    expected = resident(folder, ids, 10)
    end = next(token for token in expected[3:] if expected.index(token) >= 3)
    made = expected[: expected.index(end)]
    (folder / text.GENERATION).write_text(json.dumps({"eos_token_id": [end]}))
    try:
        told = complete(
            capsys, "--checkpoint", folder, "--prompt-ids", "5,6,7,8", "--steps", 10, "--memory", "2MiB",
            "--engine", "fused", "--eviction", "lfu", "--hardware", "pcie4-x16", "--timeline", "seen.json",
        )  # fmt: skip
    finally:
        (folder / text.GENERATION).unlink()
    assert told.out.startswith(" ".join(map(str, made)) + "\n\n")
    assert f"4 tokens of prompt, {len(made) + 1} new (ended by the model)" in told.out
    assert len(compiles) == len(made) + 2 and len(set(compiles)) == 1 and compiles[0] > 0
    assert "simulated: the recorded routing; times of the simulator's clock with hardware pcie4-x16" in told.out
    assert "fused engine, lfu" in told.out and " of 2.00 MiB (worked out from shapes)" in told.out
    passes = len(made) + 1
    assert f"\nseen.json: measured {passes} passes beside simulated {passes} passes; open it at " in told.out
    assert [path.name for path in tmp_path.iterdir()] == ["seen.json"]  # no results unless --out says where
    events = json.loads((tmp_path / "seen.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} >= {"passes", "link", "stall"}


@pytest.mark.parametrize("given", [["--prompt", "-"], ["--prompt-file", "FILE"], ["--prompt", "hi\xe9"]])
def test_made_up_weights_take_bytes(given, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_bytes(b"hi\xc3\xa9\r\n")  # the line break is none of the prompt
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\xc3\xa9\n")))
    plans = []
    monkeypatch.setattr(completed, "make_plan", lambda config: plans.append(make_plan(config)))
    with pytest.raises(AttributeError):  # of the plan that is none
        experiments.offload.main([*given, "--model", "tiny", "--smoke"])
    assert plans[0].prompt == (tuple(byte % 96 for byte in b"hi\xc3\xa9"), None, frozenset())
    assert "the tokens are the prompt's bytes modulo 96" in capsys.readouterr().err
    assert plans[0].engine == "layerwise" and plans[0].config.steps == 8


def test_experts_of_few_bits_take_less_memory(folder):
    cfg, given = load_config(folder), {"model": str(folder), "prompt_ids": (1, 2), "steps": 4, "memory": "480KiB"}
    beside, slots = layerwise.beside(cfg, 2, 4), []
    for precision in ("native", "int8"):
        size = moe.expert_bytes(cfg, None if precision == "native" else precision)
        slots.append((480 * 1024 - beside.bytes(size)) // size)
        plan = make_plan(Completion(**given, precision=precision).checked())
        assert plan.setting.capacity == f"{slots[-1]} slots"
    assert 0 < slots[0] < slots[1] < 16
    for engine in ("layerwise", "fused"):
        model = plan.weights.open(engine, plan.precision)
        assert (model.precisions, model.experts.bytes) == ("int8", 16 * size)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layerwise", "fused"])
def test_what_an_engine_says_it_holds_is_what_it_holds(name):
    cfg, key = moe.tiny("qwen2_moe", "float32"), jax.random.key(0)
    params, prompt, steps = moe.random_params(cfg, key), 6, 5
    if name == "fused":
        engine = fused.Fused(cfg, params, store.stack_random(cfg, key), capacity="3 slots")
        fixed = engine._fixed
        held = (params, fixed.embed, fixed.head, fixed.segments, fixed.tail)
        slots = engine._begin().slots.down.shape[0]
        told, places = fused.beside(cfg, prompt, steps), slots + 2 - 3  # two more in a prefill
    else:
        held, told, places = params, layerwise.beside(cfg, prompt, steps), cfg.top_k
    unique = {id(leaf): leaf for leaf in jax.tree.leaves(held)}
    assert told.dense_bytes == tree_bytes(list(unique.values())) and told.experts == places
    assert told.cache_bytes == tree_bytes(moe.init_cache(cfg, 1, prompt + steps - 1))


def test_a_head_that_is_the_embedding_is_held_once():
    tied, own = (moe.tiny("qwen3_moe", "float32", tie_word_embeddings=tie) for tie in (True, False))
    once, twice = (tree_bytes(memory.dense_spec(cfg)) for cfg in (tied, own))
    assert twice - once == tied.vocabulary * tied.width * 4


def test_memory_is_divided_to_the_byte():
    beside = memory.Beside(dense_bytes=1000, cache_bytes=200, record_bytes=30, work_bytes=4, experts=2)
    assert beside.bytes(100) == 1434
    assert memory.slots_for(1534, beside, 100, 9) == memory.slots_for(1633, beside, 100, 9) == 1
    assert memory.slots_for(1634, beside, 100, 9) == 2
    assert memory.slots_for(10**6, beside, 100, 9) == 9  # everything
    with pytest.raises(SpecmdError, match=r"^memory of 0.0 MiB is too little: expected at least 0.1 MiB \(dense"):
        memory.slots_for(1533, beside, 100, 9)


def test_what_is_needed_at_least_is_enough(folder):
    def plan(size):
        return make_plan(Completion(model=str(folder), prompt_ids=(1, 2), memory=size, steps=4).checked())

    with pytest.raises(SpecmdError, match=r"memory of 0\.0 MiB is too little: expected at least (\d+\.\d) MiB") as told:
        plan("1kB")
    found = re.search(r"at least (\S+) MiB", str(told.value))
    assert found is not None
    least = float(found[1])
    assert str(plan(f"{least}MiB").setting.capacity) in ("1 slots", "2 slots", "3 slots")  # a tenth is two experts
    with pytest.raises(SpecmdError, match="too little"):
        plan(f"{least - 0.1}MiB")


def test_a_device_that_says_what_it_has_is_asked(folder, monkeypatch):
    monkeypatch.setattr(completed, "device_bytes", lambda: 3 << 20)
    settings = Completion(model=str(folder), prompt_ids=(1, 2), steps=4)

    def plan(**changes):
        return make_plan(Completion(model=str(folder), prompt_ids=(1, 2), steps=4, **changes).checked())

    assert make_plan(settings).memory_bytes == 3 << 20
    with pytest.raises(SpecmdError, match=r"^--memory 4MiB: the device has 3\.0 MiB, expected no more$"):
        plan(memory="4MiB")
    assert plan(capacity="1 slot").memory_bytes is None
    monkeypatch.setattr(completed, "device_bytes", lambda: 1 << 20)
    with pytest.raises(SpecmdError, match=r"^--capacity 100% takes \d\.\d MiB with all else, the device has 1\.0 MiB$"):
        plan(capacity="100%")


# ---- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capacity", "most"), [("1 slots", 12), ("40%", 12), ("100%", 0)])
def test_rates_of_runs_predict_others_alike(capacity, most):
    """Runs whose passes take exactly so much, and so much for each copy."""
    cfg = moe.tiny("olmoe", "float32")
    policy, layers, prompt_s, pass_s, copy_s = make_policy(cfg, 4096, capacity=capacity), 3, 0.5, 0.01, 0.002

    def run(seed):
        trace = synthesize(
            layers=layers, experts=cfg.experts, top_k=cfg.top_k, tokens=30, requests=1, prompt_tokens=6, seed=seed
        )
        replays, events = policy.replay(trace)
        copies = (events.outcome == FETCHED).sum(axis=-1)
        prefill = replays.schedule.phase == PREFILL
        visit_s = np.where(prefill, prompt_s, pass_s) / layers + copies * copy_s
        events = events._replace(prefetched=np.zeros((len(copies), 1, cfg.experts), np.int32))
        decisions = [Decision(*(getattr(events, name)[v] for name in Decision._fields)) for v in range(len(copies))]
        ttft_s, later_s = visit_s[prefill].sum(), visit_s[~prefill].sum() / 24
        made = Run(None, trace, tuple(decisions), visit_s, np.array([ttft_s]), np.array([later_s]), None, 0, 0)
        return made, copies[~prefill]

    (one, copies), (other, _), (third, _) = run(1), run(2), run(3)
    rates = predict.fit_alike([one, other])
    guess = predict.predict_passes(policy, third.trace, rates)
    assert guess.tpot_s == pytest.approx(third.tpot_s[0])
    if len(np.unique(copies.reshape(-1, layers).sum(axis=1))) > 1:
        assert rates == pytest.approx((prompt_s, pass_s, copy_s, copy_s, 0.0, 0.0)) and guess.ttft_s == pytest.approx(
            third.ttft_s[0]
        )


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    ("--prompt=", "--prompt is empty, expected text"),
    ("--prompt x --prompt-ids 1", "--prompt and --prompt-ids given, expected one prompt"),
    ("--prompt-file nowhere.txt", "nowhere.txt: no such file, expected the text of a prompt"),
    ("--prompt-file EMPTY", "EMPTY is empty, expected the text of a prompt"),
    ("--prompt-file BINARY", "BINARY: byte 1 is no UTF-8, expected the text of a prompt"),
    ("--prompt-ids 1,x", "argument --prompt-ids: invalid list of int values: '1,x'"),
    ("--prompt-ids -1", "prompt_ids is -1, expected at least 0"),
    ("--prompt-ids 320", "prompt: sequence 0, token 0: id 320 is outside the vocabulary 0..319"),
    ("--prompt x --memory 1GiB --capacity 25%", "--memory and --capacity are given, expected one of them"),
    ("--prompt x --memory much", "memory 'much' cannot be read: expected bytes, such as 6GiB or 500MB"),
    ("--prompt x --memory 25%", "memory '25%' cannot be read: expected bytes"),
    ("--prompt x --memory=-1GiB", "memory '-1GiB' cannot be read: expected bytes"),
    ("--prompt x --memory 0", "memory of 0.0 MiB is too little: expected at least"),
    ("--prompt x --capacity 200%", "capacity '200%' is above everything"),
    ("--prompt x --steps 0", "steps is 0, expected at least 1"),
    ("--prompt x --steps 100000", "prompt of 1 and 100000 new tokens need 100000 positions, there are"),
    ("--prompt x --eviction lru2", "unknown eviction policy 'lru2'; did you mean 'lru'?"),
    ("--prompt x --eviction belady", "eviction 'belady' looks into the future"),
    ("--prompt x --prefetch perfect", "prefetch 'perfect' looks into the future"),
    ("--prompt x --engine fast", "unknown engine 'fast'"),
    ("--prompt x --precision mxfp4", "olmoe: the checkpoint holds no mxfp4 experts (choose int4)"),
    ("--prompt x --model tiny --precision int8", "--precision int8: expected a checkpoint"),
    ("--prompt x --model nowhere/at/all", "nowhere/at/all: no config.json there, expected the folder of a checkpoint"),
    ("--prompt x --checkpoint nowhere", "nowhere: no config.json there, expected the folder of a checkpoint"),
    ("--prompt x --model tinny", "unknown published model 'tinny'; did you mean 'tiny'?"),
    ("--prompt x --hardware nowhere.json", "nowhere.json: no such file"),
    ("--prompt x --capacities 25%", "--capacities has no effect with a prompt, expected"),
    ("--prompt x --batch 2", "--batch has no effect with a prompt, expected"),
    ("--memory 1GiB", "--memory has no effect without a prompt, expected --prompt TEXT"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[options for options, _ in BAD])
def test_bad_input_is_one_line_before_any_weight_is_read(options, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "load_dense", None)
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "BINARY").write_bytes(b"a\xff")
    given = options.split(" ")
    given += [] if "--model" in given or "--checkpoint" in given else ["--model", str(folder)]
    with pytest.raises((SpecmdError, SystemExit)) as told:
        experiments.offload.main(given)
    said = capsys.readouterr().err if isinstance(told.value, SystemExit) else str(told.value)
    assert message in said and said.strip().count("\n") == 0


def damaged(folder, tmp_path, what):
    """A copy of the checkpoint with one thing wrong."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = checkpoint_tensors("olmoe", **SHAPE)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if what == "missing":
        del tensors[name]
    if what == "dtype":
        tensors[name] = tensors[name].astype(np.int64)
    if what in ("missing", "dtype"):
        (tmp_path / SINGLE).unlink()
        save(tmp_path, "olmoe", tensors, **SHAPE)
    if what == "tokenizer":
        (tmp_path / text.TOKENIZER).unlink()
    if what == "garbled":
        (tmp_path / text.TOKENIZER).write_text("{}")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "tensor model.layers.1.mlp.experts.3.up_proj.weight is missing"),
        ("dtype", "up_proj.weight has type I64, expected F32"),
        ("tokenizer", "no tokenizer.json there, expected it beside the weights (token ids need none)"),
        ("garbled", "tokenizer.json: not a tokenizer ("),
    ],
)
def test_a_damaged_folder_is_one_line_before_any_weight_is_read(what, message, folder, tmp_path, monkeypatch):
    damaged(folder, tmp_path, what)
    monkeypatch.setattr(weights, "load_dense", None)
    with pytest.raises(SpecmdError) as told:
        experiments.offload.main(["--model", str(tmp_path), "--prompt", "x"])
    assert message in str(told.value) and "\n" not in str(told.value)


def test_without_the_package_it_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SpecmdError, match=r"tokenizers is not installed: pip install 'specmd-jax\[text\]'$"):
        text.open_tokenizer(folder)


def test_the_help_has_every_option_of_a_prompt(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit):
        experiments.offload.main(["--help"])
    told = capsys.readouterr().out
    for one in fields(Completion):
        said = one.metadata["setting"]
        assert f"--{one.name.replace('_', '-')} " in told
        if one.name not in ("model", "checkpoint", "engine", "steps"):
            assert f"(default: {said.shown or shown(one.default)})" in told


def test_without_options_the_model_of_the_package_completes_a_text(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    plans = []
    monkeypatch.setattr(completed, "make_plan", lambda config: plans.append(make_plan(config)))
    with pytest.raises(AttributeError):  # of the plan that is none
        experiments.offload.main([])
    plan = plans[0]
    assert plan.weights.name == "specmd-reference" and plan.prompt.tokenizer is not None
    assert capsys.readouterr().out.startswith(plan.config.prompt)
    assert plan.setting.capacity == "25%"  # not all experts fit
