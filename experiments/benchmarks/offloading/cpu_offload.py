"""`accelerate.cpu_offload` of the same shape, in torch."""

from __future__ import annotations

import importlib.util
import time

import jax
import numpy as np

from experiments.benchmarks.offloading.bench import Bench, Result
from specmd_jax import moe


def accelerated(bench: Bench) -> Result:
    """Times `accelerate.cpu_offload` of the same shape: every module's weights go to the device for each pass."""
    if bench.toy or not importlib.util.find_spec("accelerate") or jax.default_backend() != "gpu":
        return {"left out": "toy size" if bench.toy else "needs a GPU and accelerate"}
    import torch  # pyright: ignore[reportMissingImports]
    from accelerate import cpu_offload  # pyright: ignore[reportMissingImports]
    from transformers import OlmoeConfig, OlmoeForCausalLM  # pyright: ignore[reportMissingImports]

    config = OlmoeConfig(**{k: v for k, v in moe.PUBLISHED["OLMoE-1B-7B"].items() if k != "model_type"})
    begin = time.perf_counter()
    with torch.device("meta"):
        model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model = cpu_offload(model.eval(), execution_device=torch.device("cuda:0"))
    made_s = time.perf_counter() - begin
    ids = torch.tensor(bench.prompts(1)[0][None]).cuda()
    took, past, fed = [], None, ids  # the first pass warms up, the second is the timed prefill
    with torch.no_grad():
        for step in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            out = model(fed, past_key_values=past, use_cache=True)
            torch.cuda.synchronize()
            took.append(time.perf_counter() - begin)
            past, fed = (out.past_key_values, out.logits[:, -1:].argmax(-1)) if step else (None, ids)
    return {"made_s": made_s, "first_pass_s": took[0], "ttft_s": took[1], "tpot_s": float(np.mean(took[2:]))}
