"""What 20,000 tokens of a model that nobody trained on are worth: trained weights, and a policy that adapts."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.learned import EVICTOR, PREFETCHER
from experiments.common.evaluate_rows import CORRECTING
from experiments.documenting.blocks import table
from experiments.offloading.reading import held_out_texts, read_texts
from specmd_jax import bundled, synthesize
from specmd_jax.files import replace_text
from specmd_jax.learn.evaluation import Interval, hits_by_request, ratio, recall_by_request
from specmd_jax.learn.splits import Split
from specmd_jax.learn.training import card, export, fit
from specmd_jax.setting import Setting
from specmd_jax.specs.models import MODELS
from specmd_jax.trace import select_requests
from specmd_jax.trace.locality import locality_of
from specmd_jax.types import Trace

CAPACITY, TOKENS, SEED = "25%", 20_480, 0
LIKE = "DeepSeek-V2-Lite"
HEADS = {"evictor": EVICTOR, "prefetcher": PREFETCHER}


def _texts() -> Trace:
    return read_texts(held_out_texts(range(8)), "held-out text of its corpus").trace


def _made_up() -> Trace:
    spec, (knobs, _) = MODELS[LIKE], locality_of(LIKE, MODELS[LIKE].experts, MODELS[LIKE].top_k)
    return synthesize(
        layers=spec.layers, experts=spec.experts, top_k=spec.top_k, tokens=512, requests=80, seed=SEED,
        **knobs._asdict(),
    )  # fmt: skip


class Subject(NamedTuple):
    """A trace, and the part of its tokens that may be learned from."""

    title: str
    trace: Callable[[], Trace]
    share: float = 1.0  # of `TOKENS`


SUBJECTS: Mapping[str, Subject] = MappingProxyType(
    {
        "gpt-oss-20b": Subject("gpt-oss-20b, weights from nothing", functools.partial(bundled, "gpt-oss-20b")),
        "specmd-reference": Subject("specmd-reference, 40 texts", _texts, 0.8),  # there are no more tokens
        "synthetic": Subject(f"synthetic routing, locality of {LIKE}", _made_up),
    }
)


def parted(trace: Trace, tokens: int) -> Split:
    """Draws requests of about so many tokens to learn from, a tenth of them to choose the epoch; the rest judges."""
    order = np.random.default_rng(SEED).permutation(trace.requests)
    count = int((np.cumsum(trace.lengths[order]) <= tokens).sum())
    chosen = order[: max(2, count // 10)]
    return Split(*(np.sort(part) for part in (order[len(chosen) : count], chosen, order[count:])))


def trained(trace: Trace, parts: Split, folder: Path) -> dict[str, float]:
    """Trains both heads as `experiments.train` does, where that was not done; gives the seconds of each."""
    told = folder / "seconds.json"
    spent: dict[str, float] = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
    for head, config in HEADS.items():
        if head in spent:
            continue
        settings, began = replace(config.settings, split="request"), time.perf_counter()
        done = fit(trace, settings, folder / "run" / head, lambda line: print(line, file=sys.stderr), parts)
        export(folder / f"{head}.npz", done.weights, head, card(trace, settings, done))
        spent[head] = time.perf_counter() - began
        replace_text(told, json.dumps(spent))
    return spent


def judged(trace: Trace, parts: Split, folder: Path) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Gives the gap that each eviction policy closes on the requests that judge, and the recall of each prefetcher."""
    learned = np.sort(np.concatenate([parts.train, parts.validation]))
    held, both = (select_requests(trace, rows) for rows in (parts.test, [*learned, *parts.test]))
    budget, last, top_k = [Setting(capacity=CAPACITY, scope="layer").budget(held)], -held.requests, trace.top_k
    evictor, prefetcher = ({"checkpoint": str(folder / f"{head}.npz")} for head in HEADS)

    def hits(name: str, of: Trace = held, numbers: Mapping[str, object] | None = None) -> npt.NDArray[np.int64]:
        return hits_by_request(of, name, budget, numbers)[0, last:]

    def recall(name: str, of: Trace = held, numbers: Mapping[str, object] | None = None) -> Interval:
        right, used = recall_by_request(of, name, [top_k], numbers)[:, last:].sum(axis=2)
        return ratio(right, used)

    low, high = hits("lru"), hits("belady")
    gained = {
        "online": hits("online"),
        "adaptive": hits("adaptive"),
        "after": hits("adaptive", both),
        "learned": hits("learned", held, evictor),
        "begun": hits("adaptive", held, {**evictor, **CORRECTING}),
    }
    found = {name: ratio(each - low, high - low) for name, each in gained.items()}
    return found, {
        "online": recall("online"),
        "adaptive": recall("adaptive"),
        "after": recall("adaptive", both),
        "learned": recall("learned", held, prefetcher),
    }


TOLD = {
    "online": "`online`",
    "adaptive": "`adaptive`, which begins with nothing",
    "after": "`adaptive`, after it ran through the tokens learned from",
    "learned": "`learned`, trained on them",
    "begun": "`adaptive`, begun with the trained evictor",
}


def twenty_thousand(results: Path) -> str:
    """Gives a line per policy, two columns per model: gap closed, and recall of the next layer's experts."""
    head, lines = ["% (95 %)"], {name: [text] for name, text in TOLD.items()}
    seconds, counts = ["seconds of training: evictor, prefetcher"], ["tokens learned from, that judge"]
    for name, (title, make, share) in SUBJECTS.items():
        trace, folder = make(), results / "unseen" / name
        folder.mkdir(parents=True, exist_ok=True)
        parts = parted(trace, int(TOKENS * share))
        spent = trained(trace, parts, folder)
        gaps, recalls = judged(trace, parts, folder)
        head += [f"{title}: gap closed", "recall"]
        for policy, line in lines.items():
            line += [_shown(gaps[policy]), _shown(recalls[policy]) if policy in recalls else ""]
        learned, kept = (int(trace.lengths[rows].sum()) for rows in ([*parts.train, *parts.validation], parts.test))
        counts += [f"{learned:,}, {kept:,}", ""]
        seconds += [", ".join(f"{spent[each]:.0f}" for each in HEADS), ""]
    return table(head, [*lines.values(), counts, seconds])


def _shown(found: Interval) -> str:
    return f"{100 * found.value:.1f} ({100 * found.low:.1f}..{100 * found.high:.1f})"


STUDIED: Mapping[str, Callable[[Path], str]] = MappingProxyType({"unseen": twenty_thousand})
"""Block of specmd_jax/learn/README.md -> what makes it, given the folder of results."""
