"""Routing captured from running torch models, against the Flax model's on the same weights; and the command.

Needs torch and transformers, but for the tests of what is said without them.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.model import families
from specmd_jax.trace import import_trace, load_trace, save_trace, validate
from specmd_jax.trace.capture import Recorder, capture, find_gates

ROOT = Path(__file__).parents[1]
PROMPT, NEW = 9, 6


@pytest.fixture
def torch() -> Any:
    pytest.importorskip("transformers")
    found = pytest.importorskip("torch")
    found.set_num_threads(1)
    return found


def model_of(torch: Any, family: str, **changes: Any) -> Any:
    """A random model; no router near a tie, no parameter at a trivial value."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**families.tiny_hf(family, **changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * gain + (1.0 if "norm.weight" in name else 0.0))
    return model.eval()


def generate(torch: Any, model: Any, prompt: list[int], new: int = NEW, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
    return out[0].tolist()


@pytest.mark.parametrize("family", moe.FAMILIES)
def test_captured_routing_is_the_flax_models(torch: Any, family: str, tmp_path: Path) -> None:
    model = model_of(torch, family)
    model.save_pretrained(tmp_path)
    cfg, params, store = weights.load(tmp_path)
    prompt = np.random.default_rng(1).integers(0, cfg.vocabulary, PROMPT).tolist()
    with capture(model, logits=True, token_ids=True) as recorder:
        text = generate(torch, model, prompt)
    trace = recorder.trace()

    assert (trace.prompt_lengths.tolist(), trace.lengths.tolist()) == (
        [PROMPT],
        [PROMPT + NEW - 1],
    )  # the last: not run
    assert (trace.experts, trace.top_k, trace.layers) == (cfg.experts, cfg.top_k, len(cfg.moe_layers))
    assert trace.expert_bytes.tolist() == [moe.expert_bytes(cfg)] * trace.layers
    assert trace.meta["model_type"] == family
    assert trace.meta.get("layer_numbers", list(range(trace.layers))) == list(cfg.moe_layers)
    assert trace.meta["requests"] == [{"prompt_tokens": PROMPT, "token_ids": text[:-1]}]

    net, cache = moe.build(cfg), moe.init_cache(cfg, 1, len(text) - 1)
    run = jax.jit(lambda p, s, i: moe.forward(net, p, s, i, cache, jnp.zeros(1, jnp.int32))[2])
    routing = run(params, store, jnp.asarray([text[:-1]], jnp.int32))
    ids, gates, logits = (
        np.asarray(part)[:, 0].swapaxes(0, 1) for part in (routing.ids, routing.gates, routing.logits)
    )
    order = np.argsort(-gates, axis=-1, kind="stable")
    assert trace.gates is not None and trace.logits is not None
    np.testing.assert_array_equal(trace.expert_ids, np.take_along_axis(ids, order, -1))
    np.testing.assert_allclose(trace.gates, np.take_along_axis(gates, order, -1), atol=1e-5)
    np.testing.assert_allclose(trace.logits, logits, atol=1e-4 * np.abs(logits).max())
    assert (np.diff(trace.gates, axis=-1) <= 0).all()
    assert len(np.unique(trace.expert_ids)) > cfg.top_k  # routing that never changes would prove little

    save_trace(trace, tmp_path / "t.npz")
    np.testing.assert_array_equal(load_trace(tmp_path / "t.npz").expert_ids, trace.expert_ids)


def test_chunks_turns_and_labels(torch: Any) -> None:
    model = model_of(torch, "mixtral")
    tokens = torch.arange(12)[None]
    with capture(model) as recorder:
        texts = [generate(torch, model, prompt) for prompt in ([3], [4, 5])]
    trace = recorder.trace()
    assert recorder.requests == 2 and [len(text) for text in texts] == [1 + NEW, 2 + NEW]
    assert trace.prompt_lengths.tolist() == [1, 2] and trace.lengths.tolist() == [NEW, NEW + 1]
    with torch.no_grad(), capture(model, name="mine", expert_bytes=7) as recorder:
        recorder.label(prompt_id="a")
        out = model(tokens[:, :4], use_cache=True)
        for start, stop in ((4, 6), (6, 7), (7, 8), (8, 11), (11, 12)):  # a chunk, two steps, a further turn, a step
            out = model(tokens[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
        middle = recorder.trace()
        out = model(inputs_embeds=torch.zeros(1, 2, model.config.hidden_size), past_key_values=None)
    trace = recorder.trace()
    assert (middle.lengths.tolist(), middle.prompt_lengths.tolist()) == ([8, 4], [6, 3])
    assert (trace.lengths.tolist(), trace.prompt_lengths.tolist()) == ([8, 4, 2], [6, 3, 2])
    assert trace.meta["requests"][:2] == [
        {"prompt_tokens": 6, "prompt_id": "a"},
        {"prompt_tokens": 3, "context_start": 8},
    ]
    assert trace.model == "mine" and trace.expert_bytes.tolist() == [7] * 3
    with capture(model) as whole, torch.no_grad():
        model(tokens)
    np.testing.assert_array_equal(whole.trace().expert_ids, trace.expert_ids[:12])


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_what_cannot_be_captured_is_refused(torch: Any) -> None:
    model = model_of(torch, "olmoe")
    before = hooks_of(model)

    def refused(call: Any, message: str) -> Recorder:
        with torch.no_grad(), pytest.raises(SpecmdError, match=message) as caught, capture(model) as recorder:
            call()
        assert "\n" not in str(caught.value) and hooks_of(model) == before
        return recorder

    pair = torch.tensor([[1, 2, 3], [4, 5, 6]])
    recorder = refused(lambda: model(pair), "a batch of 2 sequences, expected 1")
    with pytest.raises(SpecmdError, match="nothing was captured"):
        recorder.trace()
    refused(lambda: generate(torch, model, [1, 2, 3], use_cache=False), "generate with use_cache=True")
    refused(lambda: model.model(pair[:1]), r"model\.layers\.0\.mlp\.gate ran outside of a pass")
    refused(lambda: model(), "without input_ids or inputs_embeds")

    def cut() -> None:
        out = model(pair[:1], use_cache=True)
        out.past_key_values.crop(-1)
        model(pair[:1, :1], past_key_values=out.past_key_values)

    refused(cut, "request 0: 2 cached tokens after 3 were seen, expected 3")
    warm = model(pair[:1], use_cache=True).past_key_values
    refused(lambda: model(pair[:1, :1], past_key_values=warm), "the first pass goes on after 3 cached tokens")

    gate = model.model.layers[1].mlp.gate
    whole = type(gate).forward
    gate.forward = lambda h: whole(gate, h)[0]
    refused(lambda: model(pair[:1]), r"model\.layers\.1\.mlp\.gate \(OlmoeTopKRouter\) gave float32 \[3, 8\] for 3")
    gate.forward = lambda h: None
    refused(lambda: model(pair[:1]), r"layers\.1\.mlp\.gate \(OlmoeTopKRouter\) gave NoneType for 3 tokens")
    del gate.forward
    model.model.layers[2].mlp.forward = lambda h: h
    refused(lambda: model(pair[:1]), r"layers\.2\.mlp\.gate did not run in a pass")


def test_models_without_routers(torch: Any) -> None:
    transformers = pytest.importorskip("transformers")
    dense = transformers.AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    with pytest.raises(SpecmdError, match="LlamaForCausalLM has no router: expected blocks that hold 'experts'"):
        find_gates(transformers.AutoModelForCausalLM.from_config(dense))
    model = model_of(torch, "olmoe")
    mlp = model.model.layers[1].mlp
    mlp.other = torch.nn.Linear(3, 8)
    with pytest.raises(
        SpecmdError, match=r"layers\.1\.mlp\.experts: .*weight of 8 rows beside it, found gate and other"
    ):
        find_gates(model)
    del mlp.other, mlp.gate
    with pytest.raises(SpecmdError, match=r"layers\.1\.mlp\.experts: .*, found none"):
        find_gates(model)
    with pytest.raises(SpecmdError, match="expert_bytes is 0"), capture(model_of(torch, "olmoe"), expert_bytes=0):
        pass


def test_capture_wants_a_torch_module() -> None:
    with pytest.raises(SpecmdError, match="a str to capture, expected a torch module"), capture("a model"):
        pass


def test_torch_is_no_dependency() -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"  # importing one raises ImportError
        "import specmd_jax, specmd_jax.trace, specmd_jax.trace.capture, experiments.capture\n"
        "from specmd_jax.errors import SpecmdError\n"
        "try:\n"
        "    experiments.capture.main(['--smoke', '--out', 'never'])\n"
        "except SpecmdError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch is not installed, expected it for a capture (pip install torch)\n"
    assert not (ROOT / "never").exists()


def test_a_recorder_dump_of_torch(torch: Any, tmp_path: Path) -> None:
    record = {
        "forward_pass_id": 1,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [5, 6],
        "positions": [0, 1],
        "extend_seq_lens": [2],
        "forward_mode": 1,
        "topk_ids_of_layer": torch.tensor([[[2, 0, -1], [1, 2, -1]]], dtype=torch.int32),
        "misc_objects": [],
    }
    dump = {"records": [record], "last_physical_to_logical_map": torch.tensor([[1, 0, 3, 2]])}
    path = tmp_path / "d.pt"
    torch.save(dump, path)
    trace = import_trace(path, "sglang", expert_bytes=8)
    assert trace.expert_ids.tolist() == [[[3, 1]], [[0, 3]]] and trace.experts == 4
    torch.save({"records": [Path("x")]}, path)
    with pytest.raises(SpecmdError, match=r"d\.pt: cannot read: Weights only load failed") as caught:
        import_trace(path, "sglang")
    assert "\n" not in str(caught.value)
    path.write_bytes(b"nothing")
    with pytest.raises(SpecmdError, match=r"d\.pt: cannot read"):
        import_trace(path, "sglang")


# --------------------------------------------------------------------------------------------------- command


def test_command_on_a_checkpoint(torch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    from experiments import capture as command

    folder = tmp_path / "tiny-model"
    model_of(torch, "qwen3_moe").save_pretrained(folder)
    words = {"[UNK]": 0, "one": 1, "two": 2, "three": 3}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    fast.chat_template = "{% for m in messages %}three {{ m.content }} three{% endfor %}"
    fast.save_pretrained(folder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two three\n\ntwo\n")
    options = ["--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    few = ["--repeats", "2", "--timed-tokens", "2", "--new-tokens", "3", "--device", "cpu"]
    command.main([*options, *few, "--logits", "--chat-template"])
    trace = load_trace(tmp_path / "out" / "trace.npz")
    validate(trace)
    assert trace.prompt_lengths.tolist() == [5, 3] and trace.lengths.tolist() == [7, 5]
    assert trace.model == "tiny-model" and trace.logits is not None
    assert [row["chat_template"] for row in trace.meta["requests"]] == [True, True]
    assert trace.meta["requests"][0]["token_ids"][:5] == [3, 1, 2, 3, 3]
    shown = capsys.readouterr().out
    for pattern in (r"TPOT alone +[\d.]+ ms \(", r"TPOT hooked +[\d.]+ ms \(", r"overhead .*, measured: 2 pairs of 2"):
        assert re.search(pattern, shown)
    assert (tmp_path / "out" / "rows.csv").read_text().count("measured") == 4
    with pytest.raises(SpecmdError, match=r"trace\.npz already exists"):
        command.main([*options, *few])
    (folder / "model.safetensors").write_bytes(b"none")
    with pytest.raises(SpecmdError, match="tiny-model: cannot load"):
        command.main([*options[:4], "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--model FOLDER and --prompts FILE are missing"),
        (("--model", "x"), "--model FOLDER and --prompts FILE go together"),
        (("--model", "gone", "--prompts", "p"), "gone: no config.json there, expected the folder of a checkpoint"),
        (("--smoke", "--repeats", "0"), "repeats is 0, expected at least 1"),
        (("--smoke", "--chat-template"), "--chat-template is given without --model"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    from experiments import capture as command

    with pytest.raises(SpecmdError, match=message):
        command.main(options)
