"""Every family against its `transformers` model in torch: same weights, same logits, same routing, same greedy text.

Needs torch and transformers (any build; the CPU is used); skipped without them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import write_safetensors

from specmd_jax import moe, safetensors
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.checkpoint.folder import SINGLE
from specmd_jax.moe.checkpoint.text import open_tokenizer
from specmd_jax.moe.model import families, rope
from specmd_jax.moe.training.export import plain
from specmd_jax.reference import held_out_texts, reference_folder

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'specmd-jax[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'specmd-jax[parity]'"
)

torch.set_num_threads(1)
PROMPT, STEPS = 12, 32
ROUTER_CLASS = {"phimoe": "PhimoeTopKRouter", "deepseek_v2": "DeepseekV2TopkRouter"}

CASES = {
    **{name: (name, {}) for name in moe.FAMILIES},
    "olmoe-tied": ("olmoe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen2_moe-sparse": (
        "qwen2_moe",
        {
            "decoder_sparse_step": 2,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
    ),
    "deepseek_v2-lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0}),
}


def torch_model(family, changes, seed=0):
    """A random model with every parameter away from its trivial initial value: sinks, biases and norms matter."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**families.tiny_hf(family, **changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * gain + (1.0 if "norm.weight" in name else 0.0))
    return model.eval()


def torch_routing(model, ids):
    """Expert ids [L, T, K], gates and logits of each router, from hooks on the routers themselves."""
    seen = []
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    hooks = [m.register_forward_hook(lambda _, __, out: seen.append([a.numpy() for a in out])) for m in routers]
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, [np.stack(column) for column in zip(*seen, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_parity(case, tmp_path):
    family, changes = CASES[case]
    reference = torch_model(family, changes)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    cfg, params, store = weights.load(tmp_path, check_finite=True)
    assert cfg == families.tiny(family, **changes)  # the saved config reads like the dictionary it was made from

    net, ids = moe.build(cfg), np.random.default_rng(1).integers(0, cfg.vocabulary, (1, PROMPT + STEPS))
    cache = moe.init_cache(cfg, 1, ids.shape[1])
    x, _, routing = jax.jit(lambda p, s, i: moe.forward(net, p, s, i, cache, jnp.zeros(1, jnp.int32)))(
        params, store, jnp.asarray(ids, jnp.int32)
    )
    logits = np.asarray(net.head(params["head"], x[0]))
    expected, (router_logits, gates, chosen) = torch_routing(reference, ids)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected[0], atol=1e-4 * scale, rtol=0)
    np.testing.assert_allclose(routing.logits[:, 0], router_logits, atol=1e-4 * np.abs(router_logits).max(), rtol=0)
    order, ours = np.argsort(chosen, axis=-1), np.argsort(routing.ids[:, 0], axis=-1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(routing.ids[:, 0]), ours, -1), np.take_along_axis(chosen, order, -1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(routing.gates[:, 0]), ours, -1),
        np.take_along_axis(gates, order, -1),
        atol=1e-5,
    )

    if not changes:
        prompt = ids[:, :PROMPT]
        with torch.no_grad():
            text = reference.generate(torch.tensor(prompt), max_new_tokens=STEPS, do_sample=False)[0, PROMPT:].numpy()
        np.testing.assert_array_equal(moe.generate(cfg, params, store, prompt, STEPS).tokens[0], text)
        assert len(set(text.tolist())) > 4  # a model that repeats itself would prove little


def test_mxfp4_checkpoint_reads_as_the_matrices_it_stands_for(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    reference = torch_model("gpt_oss", {})
    reference.save_pretrained(tmp_path)
    path, rng = tmp_path / SINGLE, np.random.default_rng(3)
    file = safetensors.TensorFile(path)
    tensors = {name: np.array(file.read(name)) for name in file.tensors}
    decoded = {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape  # [E, in, out]
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 126, (experts, rows, columns // 32), dtype=np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = mxfp4.convert_moe_packed_tensors(
            torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
        )
    write_safetensors(path, tensors)
    with torch.no_grad():
        for name, matrix in decoded.items():
            reference.get_parameter(name).copy_(matrix)
    ids = np.random.default_rng(1).integers(0, 96, (1, 16))
    expected, _ = torch_routing(reference, ids)
    for precision in ("float32", "mxfp4"):
        cfg, params, store = weights.load(tmp_path, precision=precision)
        net, cache = moe.build(cfg), moe.init_cache(cfg, 1, 16)
        run = jax.jit(lambda p, s, i, net=net, cache=cache: moe.forward(net, p, s, i, cache, jnp.zeros(1, jnp.int32)))
        x, *_ = run(params, store, jnp.asarray(ids, jnp.int32))
        logits = np.asarray(net.head(params["head"], x[0]))
        np.testing.assert_allclose(logits, expected[0], atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("context", [64, 200])
def test_longrope_frequencies(context):
    config = transformers.AutoConfig.for_model(**families.tiny_hf("phimoe"))
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"]
    expected, _ = init(config, seq_len=context)
    ours, scale = rope.frequencies(families.tiny("phimoe").rope, context)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
    assert scale == (1.2 if context <= 128 else 1.3)


def test_linear_rope_frequencies():
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    config = transformers.AutoConfig.for_model(**families.tiny_hf("mixtral", rope_parameters=scaling))
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["linear"](config)
    ours, _ = rope.frequencies(families.tiny("mixtral", rope_parameters=scaling).rope, 64)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def test_the_model_that_comes_with_the_package_is_the_same_in_transformers(tmp_path, capsys):
    """Its packed weights as plain ones, in float32: logits, greedy text and tokens of held-out text of every domain."""
    folder = plain(reference_folder(), tmp_path / "plain")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert reference.config.model_type == "qwen3_moe"
    cfg, params, store = weights.load(folder, "float32", check_finite=True)
    for packed, opened in zip(
        jax.tree.leaves(weights.load(reference_folder(), "float32")[1:]), jax.tree.leaves((params, store)), strict=True
    ):
        np.testing.assert_array_equal(packed, opened)  # the folder says the same in other words

    ids = np.stack([text.windows[0, :48] for text in held_out_texts().values()]).astype(np.int32)
    net, cache = moe.build(cfg), moe.init_cache(cfg, len(ids), ids.shape[1])
    x, *_ = jax.jit(lambda p, s, i: moe.forward(net, p, s, i, cache, jnp.zeros(len(ids), jnp.int32)))(
        params, store, jnp.asarray(ids)
    )
    logits = np.asarray(net.head(params["head"], x.reshape(-1, cfg.width))).reshape(*ids.shape, -1)
    with torch.no_grad():
        expected = reference(torch.tensor(ids, dtype=torch.long)).logits.numpy()
        text = reference.generate(torch.tensor(ids[3:4, :16], dtype=torch.long), max_new_tokens=24, do_sample=False)
    scale, off = np.abs(expected).max(), np.abs(logits - expected).max()
    with capsys.disabled():
        print(f"\nspecmd-reference: logits differ by {off:.2g} at most, the largest is {scale:.3g}")
    assert off < 1e-4 * scale
    np.testing.assert_array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))
    np.testing.assert_array_equal(moe.generate(cfg, params, store, ids[3:4, :16], 24).tokens[0], text[0, 16:].numpy())

    words = "Question: Tom has 3 apples. 春眠不覺曉\n\ndef f(x):\n    return x"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(words).input_ids == open_tokenizer(folder).encode(words).ids
