"""The verbs of `specmd`, and what a command calls itself: ``specmd sweep`` or ``python -m experiments.sweep``."""

from __future__ import annotations

import re
from typing import NamedTuple


class Verb(NamedTuple):
    """A command by the name that `specmd` gives it."""

    module: str  # of `experiments`
    about: str  # one line of the overview


GROUPS: dict[str, dict[str, Verb]] = {
    "ask": {
        "recommend": Verb("recommend", "my model, my memory, my link: what do I run, how fast, and why?"),
        "run": Verb("run", "one replay of a trace, every setting by option"),
        "sweep": Verb("sweep", "which eviction policy, and how large a cache?"),
        "study": Verb("study", "which policy with which number, over capacities and links: up to millions of cells"),
    },
    "hold against what is known": {
        "validate": Verb("validate", "how far off are predicted tokens per second? published measurements beside them"),
        "paper": Verb("paper", "which claims of SpecMD does a simulator reproduce?"),
        "least_stale": Verb("least_stale", "where Least-Stale wins, ties and loses"),
        "quality": Verb("quality", "what do rules that change the output cost, and what do they save?"),
        "starts": Verb("starts", "what is a profile worth? warm starts, pinned experts, admission"),
    },
    "traces": {
        "import": Verb("import_trace", "routing that another tool recorded, as a trace file or a profile"),
        "export": Verb("export_trace", "a trace as the accesses of a cache, for libCacheSim"),
        "routing": Verb(
            "routing", "what is a model's routing like? reuse, overlap, predictability, domains, side by side"
        ),
        "capture": Verb("capture", "records the routing of a transformers model on prompts of mine"),
    },
    "real models, this machine": {
        "offload": Verb("offload", "runs a model with experts in host memory: measured beside predicted; prompts, too"),
        "train moe": Verb("train_moe", "a small mixture of experts from scratch, such as specmd-reference"),
        "pack moe": Verb("pack_moe", "what experts at 4 bits cost in held-out bits per byte; such a checkpoint"),
        "calibrate": Verb("calibrate", "this machine's numbers, as a hardware file"),
        "bench_offload": Verb("bench_offload", "how fast is the offloaded model, beside what the hardware allows"),
        "benchmark": Verb("benchmark", "how fast is the simulator, against others side by side"),
    },
    "learned policies": {
        "train": Verb("train", "weights of the learned prefetcher and evictor, from my trace, in minutes"),
        "train evictor": Verb("train_evictor", "the evictor alone, every setting by option"),
        "train prefetcher": Verb("train_prefetcher", "the prefetcher alone, every setting by option"),
        "evaluate": Verb("evaluate_learned", "what learned policies are worth on requests that they never saw"),
        "hidden_prefetch": Verb("hidden_prefetch", "prefetch from a model's activations, against ids alone"),
        "learn_policy": Verb("learn_policy", "eviction weights and a budget per layer, by gradient"),
    },
    "results": {
        "report": Verb("report", "the results of any study: drawn again, or as another kind of table"),
    },
    "about": {
        "list": Verb("list", "models, machines, traces, policies, importers, engines: what there is to choose from"),
        "doctor": Verb("doctor", "is this installation sound? versions, devices, caches, known bad combinations"),
    },
}
VERBS: dict[str, Verb] = {name: verb for group in GROUPS.values() for name, verb in group.items()}
_VERB_OF = {verb.module: name for name, verb in VERBS.items()}
_MENTIONED = re.compile(r"(?:python -m )?\bexperiments\.(\w+)\b(?!\.)")


class _Started:
    by_verb = False  # whether `specmd` runs this process


def by_verb(yes: bool) -> None:
    """Says whether commands are verbs of `specmd` in this process, in their help and in what they tell to type."""
    _Started.by_verb = yes


def program(module: str) -> str:
    """Gives what to type for ``experiments.<module>``."""
    verb = _VERB_OF.get(module) if _Started.by_verb else None
    return f"python -m experiments.{module}" if verb is None else f"specmd {verb}"


def as_typed(text: str) -> str:
    """Gives a text with the commands that it mentions as they are typed here."""
    if not _Started.by_verb:
        return text
    return _MENTIONED.sub(lambda found: program(found[1]) if found[1] in _VERB_OF else found[0], text)
