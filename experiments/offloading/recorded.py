"""The routing of the model that comes with this package on held-out text: what is bundled as `specmd-reference`."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.offloading.model import source
from specmd_jax.reference import REFERENCE, held_out_windows, reference_folder
from specmd_jax.setting import Setting
from specmd_jax.types import Trace

WINDOWS = (0, 4)  # of each domain
PROMPT_TOKENS, DECODE_TOKENS = 24, 61


def record() -> Trace:
    """Records two texts of each domain: prompts, then tokens of the text itself one by one, with router logits and the
    next gate's scores. Everything is rounded, to be small: logits to 1/64, scores and gates to 1/1024."""
    # every expert is resident and strength is 0: the router alone decides, and its logits are read
    setting = Setting(
        eviction="lru", prefetch="gate_ahead", capacity="100%", routing="cache_aware", numbers={"strength": 0.0}
    )
    engine = source(REFERENCE, str(reference_folder())).open("layerwise").engine(setting)
    windows = held_out_windows()
    domains = [name for _ in WINDOWS for name in windows if name != "bytes_per_token"]
    texts = [windows[name][at].astype(np.int32) for at in WINDOWS for name in windows if name != "bytes_per_token"]
    end = PROMPT_TOKENS + DECODE_TOKENS + 1
    text = np.stack([row[PROMPT_TOKENS:end] for row in texts])
    trace = engine.generate(
        [row[:PROMPT_TOKENS] for row in texts], DECODE_TOKENS + 1, keep_logits=True, text=text
    ).trace
    assert trace.gates is not None and trace.logits is not None and trace.ahead is not None
    meta = trace.meta | {
        "source": f"{REFERENCE}, as shipped (experts at int4), on held-out text of its corpus",
        "licence": "Apache-2.0",
        "capture": "prompts of 24 tokens, then 61 tokens of the text itself one by one; dialogues are of Taskmaster "
        "(CC BY 4.0); logits rounded to 1/64, gates and ahead to 1/1024",
        "requests": [{"dataset": name, "category": name} for name in domains],
    }
    return dataclasses.replace(
        trace,
        gates=_rounded(trace.gates, 1024).astype(np.float32),
        logits=_rounded(trace.logits, 64).astype(np.float16),
        ahead=_rounded(trace.ahead, 1024).astype(np.float16),
        meta=meta,
    )


def _rounded(values: np.ndarray, steps: int) -> np.ndarray:
    return np.round(values * steps) / steps
