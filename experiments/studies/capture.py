"""The work of `experiments.capture`: a model, its prompts, and what recording costs."""

from __future__ import annotations

import contextlib
import importlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from configs.capture import CaptureConfig
from experiments.common.command_line import output_paths
from experiments.import_trace import summary
from specmd_jax.errors import SpecmdError
from specmd_jax.files import file_sha256
from specmd_jax.moe.model import families
from specmd_jax.report.pages.capture import TABLE, draw
from specmd_jax.report.reader import MANIFEST, ROWS
from specmd_jax.report.writer import ResultWriter
from specmd_jax.trace import save_trace
from specmd_jax.trace.capture import capture

_SMOKE_FAMILY = "olmoe"


class Subject(NamedTuple):
    """A model and the token ids of its prompts, each [1, T] on its device."""

    model: Any
    prompts: list[Any]
    name: str


def run(config: CaptureConfig, out: Path, *, overwrite: bool) -> str:
    """Records, times, and writes both; gives what was found as text."""
    torch, transformers = needed("torch"), needed("transformers")
    subject = loaded(config, torch, transformers) if config.model else random_model(torch, transformers)
    path, _, _ = output_paths(out, overwrite, "trace.npz", ROWS, MANIFEST)

    with capture(subject.model, logits=config.logits, token_ids=True, name=subject.name) as recorder:
        for index, prompt in enumerate(subject.prompts):
            recorder.label(prompt_id=index, chat_template=config.chat_template)
            generate(torch, subject.model, prompt, config.new_tokens)
    trace = recorder.trace()
    timings = measure(torch, subject, config)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with ResultWriter(out, asdict(config) | versions, TABLE, overwrite) as writer:
        for repeat, pair in enumerate(timings):
            for hooks, tpot_s in zip((False, True), pair, strict=True):
                writer.write({"repeat": repeat, "hooks": hooks, "tpot_s": float(tpot_s), "evidence": "measured"})
    save_trace(trace, path, overwrite)
    return "\n".join((summary(trace), f"sha256        {file_sha256(path)}", draw(out), str(path)))


def needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SpecmdError(f"{package} is not installed, expected it for a capture (pip install {package})") from error


def loaded(config: CaptureConfig, torch: Any, transformers: Any) -> Subject:
    """Gives the checkpoint of `config.model` and its prompts; nothing is downloaded."""
    try:
        lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SpecmdError(f"{config.prompts}: expected UTF-8 text, one prompt per line: {error}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise SpecmdError(f"{config.prompts}: no prompts, expected one per line")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype="auto", local_files_only=True)
        model = model.to(device).eval()
        if config.chat_template:
            turns = [[{"role": "user", "content": text}] for text in texts]
            texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
        ids = [tokenizer(t, add_special_tokens=not config.chat_template, return_tensors="pt").input_ids for t in texts]
    except Exception as error:  # a damaged or unknown checkpoint raises anything, down to the errors of its readers
        raise SpecmdError(f"{config.model}: cannot load: {' '.join(str(error).split())[:300]}") from error
    for index, prompt in enumerate(ids):
        if not prompt.shape[1]:
            raise SpecmdError(f"{config.prompts}: prompt {index} has no tokens, expected at least 1")
    return Subject(model, [prompt.to(device) for prompt in ids], Path(config.model).resolve().name)


def random_model(torch: Any, transformers: Any) -> Subject:
    """Gives a tiny model with random weights, and two prompts of random tokens."""
    torch.manual_seed(0)
    hf = families.tiny_hf(_SMOKE_FAMILY)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf)).eval()
    prompts = [torch.randint(0, hf["vocab_size"], (1, length)) for length in (5, 8)]
    return Subject(model, prompts, f"random {_SMOKE_FAMILY}")


def generate(torch: Any, model: Any, prompt: Any, tokens: int) -> None:
    mask = torch.ones_like(prompt)
    with torch.inference_mode():
        model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True)


def measure(torch: Any, subject: Subject, config: CaptureConfig) -> list[tuple[float, float]]:
    """Times a token (without, with hooks) in each repeat; which goes first alternates, and one pair warms up."""
    pairs = []
    for repeat in range(config.repeats + 1):
        pair = {hooks: decode_s(torch, subject, config, hooks) for hooks in (repeat % 2 == 1, repeat % 2 == 0)}
        pairs.append((pair[False], pair[True]))
    return pairs[1:]


def decode_s(torch: Any, subject: Subject, config: CaptureConfig, hooks: bool) -> float:
    """Gives the seconds per greedily decoded token of the first prompt."""
    model, prompt = subject.model, subject.prompts[0]
    wait = torch.cuda.synchronize if prompt.device.type == "cuda" else lambda: None
    recording = capture(model, logits=config.logits) if hooks else contextlib.nullcontext()
    with torch.inference_mode(), recording:
        out = model(input_ids=prompt, use_cache=True)
        wait()
        begin = time.perf_counter()
        for _ in range(config.timed_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        wait()
        return (time.perf_counter() - begin) / config.timed_tokens
