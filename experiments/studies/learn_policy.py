"""The work of `experiments.learn_policy`: three searches, and what they found on test requests."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.learn_policy import LearnPolicyConfig
from experiments.common.train import read
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.files import replace_text
from specmd_jax.learn.evaluation import hits_by_request, ratio
from specmd_jax.learn.splits import split
from specmd_jax.learn.training import fingerprint
from specmd_jax.policies import EVICTION, tuned
from specmd_jax.policies.choice import Choice, Mix, choose
from specmd_jax.replay.totals import LATE, PREFETCHED, REUSED
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.learn_policy import TABLE
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.soft import replay as soft
from specmd_jax.soft import search as tuning
from specmd_jax.soft.replay import Given
from specmd_jax.soft.scores import scores_by_request
from specmd_jax.soft.search import Found, Search
from specmd_jax.specs.capacity import describe_capacity
from specmd_jax.trace import select_requests
from specmd_jax.types import Trace

Ints = npt.NDArray[np.int64]
TRAINED = ("weighted", "learned")  # policies whose numbers somebody has to find first
ADAPTIVE = ("adaptive", "online")  # learns while it runs: shown, but not one of the fixed policies


class Requests(NamedTuple):
    """The parts of a trace."""

    train: list[Given]
    validation: Trace
    test: Trace


def run(config: LearnPolicyConfig, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Searches at each capacity, and writes what was found."""
    policy = None if config.on == "none" else choose("eviction", config.on)
    if policy is not None:
        tuned(policy)  # says so before anything is read if it has no scores of its own
    trace = read(config.trace, config.requests, config.tokens)
    budgets = {
        capacity: np.asarray(Setting(capacity=capacity, scope="layer").budget(trace), np.int64)
        for capacity in config.capacities
    }
    parts = split(trace, config.split, config.search.seed)
    digest = fingerprint(trace)
    with ResultWriter(out, asdict(config), TABLE, overwrite, resume, digest) as writer:
        if overwrite:
            shutil.rmtree(out / "run", ignore_errors=True)
        requests = Requests(
            batches(select_requests(trace, parts.train), config.search, policy),
            select_requests(trace, parts.validation),
            select_requests(trace, parts.test),
        )
        found = {}
        for capacity, uniform in budgets.items():
            found |= study(requests, capacity, uniform, config, writer, out / "run")
        replace_text(out / "found.json", json.dumps(found, indent=2) + "\n")


def batches(trace: Trace, search: Search, policy: Choice | None = None) -> list[Given]:
    """Gives training requests in a drawn order, one batch after another; the last is filled up from the first.

    With a policy's own scores, which it gives the requests of the trace one after the other.
    """
    order = np.random.default_rng(search.seed).permutation(trace.requests)
    parts = [prepare(select_requests(trace, [r])) for r in order]
    longest = max(part.schedule.visits for part in parts)
    size = min(search.batch, len(parts))
    rows = np.resize(np.arange(len(parts)), -(-len(parts) // size) * size).reshape(-1, size)
    told = None if policy is None else scores_by_request(trace, policy)
    return [
        soft.given(
            [parts[i] for i in row], least=longest, scores=None if told is None else [told[order[i]] for i in row]
        )
        for row in rows
    ]


def side_by_side(trace: Trace, policy: Choice | None = None) -> Given:
    """Gives all requests of a trace as one batch, with a policy's own scores."""
    parts = [prepare(select_requests(trace, [r])) for r in range(trace.requests)]
    return soft.given(parts, scores=None if policy is None else scores_by_request(trace, policy))


def study(
    requests: Requests, capacity: str, uniform: Ints, config: LearnPolicyConfig, writer: ResultWriter, folder: Path
) -> dict[str, Any]:
    """Gives the rows of one capacity, and the numbers found for it."""
    policy = None if config.on == "none" else choose("eviction", config.on)
    weighed = choose("eviction", "weighted") if policy is None else tuned(policy)
    told = {"validation": requests.validation, "test": requests.test}
    demands = {part: demand_by_request(trace) for part, trace in told.items()}
    ends = {
        part: {name: demands[part] - hits_by_request(trace, name, [uniform])[0] for name in ("lru", "belady")}
        for part, trace in told.items()
    }
    size = describe_capacity(
        uniform, expert_bytes=requests.test.expert_bytes, experts=requests.test.experts, top_k=requests.test.top_k
    )

    def write(policy: str, method: str, tuned: str, validation: float, misses: Ints, **more: Any) -> None:
        demand, (lru, belady) = demands["test"], ends["test"].values()
        rate = ratio(misses, demand, config.draws)
        gap = ratio(lru - misses, lru - belady, config.draws)
        row: Row = {
            "model": requests.test.model, "scope": "layer", "contract": "event", "capacity": capacity,
            "capacity_bytes": int(size["bytes"]), "slots_per_layer": float(size["slots_per_layer"]),
            "cycles": float(size["cycles"]), "policy": policy, "method": method, "tuned": tuned,
            "requests": len(demand), "demand": int(demand.sum()), "misses": int(misses.sum()),
            "miss_rate": rate.value, "miss_rate_low": rate.low, "miss_rate_high": rate.high,
            "gap_closed": gap.value, "gap_closed_low": gap.low, "gap_closed_high": gap.high,
            "validation_miss_rate": validation, "soft_miss_rate": None, "against_best_fixed": None,
            "against_low": None, "against_high": None, "gradient_saves": None, "gradient_saves_low": None,
            "gradient_saves_high": None, "replays": 0, "search_s": 0.0, "history": None,
            "best_fixed": None, "evidence": "simulated",
        }  # fmt: skip
        writer.write(row | more)

    fixed: dict[str, tuple[float, Ints]] = {}
    for name in fixed_policies():
        seen, unseen = (demands[part] - hits_by_request(trace, name, [uniform])[0] for part, trace in told.items())
        fixed[name] = float(seen.sum() / demands["validation"].sum()), unseen
    best = min((name for name in fixed if name not in ADAPTIVE), key=lambda name: fixed[name][0])
    if policy is not None:
        best = policy.name
        if best not in fixed:
            seen, unseen = (
                demands[part] - hits_by_request(trace, policy, [uniform])[0] for part, trace in told.items()
            )
            fixed[best] = float(seen.sum() / demands["validation"].sum()), unseen
    for name, (rate, misses) in fixed.items():
        write(name, "adaptive" if name in ADAPTIVE else "fixed", "none", rate, misses, best_fixed=name == best)
    write("belady", "oracle", "none", float(ends["validation"]["belady"].sum() / demands["validation"].sum()),
          ends["test"]["belady"])  # fmt: skip

    validation, test = side_by_side(requests.validation, policy), side_by_side(requests.test, policy)
    total, found = float(uniform.sum()), {}
    exact = exact_misses(requests.test, weighed)
    start = tuning.beginning(validation, config.search)
    write(weighed.name, "default", "none", tuning.miss_rate(validation, start, uniform, config.search),
          exact(start, uniform))  # fmt: skip
    for sought in config.tuned:
        gradient = None
        for method in config.methods:
            name = f"{method}, {sought}"
            print(f"{capacity}: {name}", flush=True)
            place = folder / f"{int(size['bytes'])}-{method}-{sought}"
            done = tuning.tune(requests.train, validation, total, method, sought, config.search, place, _say)
            misses = exact(done.weights, done.budget_bytes)
            expected = tuning.miss_rate(test, done.weights, done.loose_bytes, config.search, config.search.cold)
            against = ratio(fixed[best][1] - misses, fixed[best][1], config.draws)
            more: dict[str, Any] = {}
            if method == "gradient":
                gradient = misses
            elif gradient is not None:
                saves = ratio(misses - gradient, misses, config.draws)
                more = {
                    "gradient_saves": saves.value,
                    "gradient_saves_low": saves.low,
                    "gradient_saves_high": saves.high,
                }
            write(
                weighed.name, method, sought, done.validation, misses, replays=done.replays, search_s=done.seconds,
                soft_miss_rate=expected,
                against_best_fixed=against.value, against_low=against.low, against_high=against.high,
                history=" ".join(f"{rate:.6f}" for rate in done.history), **more,
            )  # fmt: skip
            found[f"{capacity}, {name}"] = entry(done, misses, demands["test"], config.on)
            if sought == "budgets" and method == "gradient":  # what the budgets alone are worth to another policy
                seen, unseen = (
                    demands[part] - hits_by_request(trace, best, [done.budget_bytes])[0] for part, trace in told.items()
                )
                rate = float(seen.sum() / demands["validation"].sum())
                against = ratio(fixed[best][1] - unseen, fixed[best][1], config.draws)
                write(best, method, sought, rate, unseen, against_best_fixed=against.value, against_low=against.low,
                      against_high=against.high)  # fmt: skip
    return found


def fixed_policies() -> list[str]:
    """Gives the rows of the eviction table that neither know the future nor have to be tuned first."""
    return [name for name, factory in EVICTION.items() if name not in TRAINED and not factory().oracle]


def demand_by_request(trace: Trace) -> Ints:
    """Gives [R] demanded experts of each request."""
    schedule = prepare(trace).schedule
    return np.bincount(schedule.request, schedule.demanded, trace.requests).astype(np.int64)


def exact_misses(trace: Trace, policy: Choice) -> Any:
    """Makes a function of the numbers of an eviction policy and of budgets [L]: the exact engine's misses [R]."""
    replays = prepare(trace, reset_per_request=True)
    setup = replays.setup(Mix.of(policy), None, detail="events")
    visits = replays.visits(setup, Mix.of(policy))
    demand = demand_by_request(trace)

    def misses(numbers: dict[str, float], budget_bytes: Ints) -> Ints:
        mix = Mix.of(policy, numbers={"eviction": numbers})
        _, events = replay_many(setup, (), replays.numbers(budget_bytes, None), mix.traced(), visits)
        assert events is not None
        outcome = np.asarray(events.outcome)[: replays.schedule.visits]
        hits = np.isin(outcome, (REUSED, PREFETCHED, LATE)).sum(axis=1)
        return demand - np.bincount(replays.schedule.request, hits, trace.requests).astype(np.int64)

    return misses


def entry(found: Found, misses: Ints, demand: Ints, on: str = "none") -> dict[str, Any]:
    """Gives what `specmd_jax.run` takes, and what it gave on the test requests."""
    return {
        **({} if on == "none" else {"on": on}),
        "capacity": [int(size) for size in found.budget_bytes],
        "numbers": found.weights,
        "test_miss_rate": float(misses.sum() / demand.sum()),
        "validation_miss_rate": found.validation,
    }


def _say(line: str) -> None:
    print(f"  {line}", flush=True)
