"""What the paper claims, in short, and how each claim is tested.

The rules that turn cases into verdicts are those of `specmd_jax.report.verdicts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from specmd_jax.report.pages.paper import numbers as paper
from specmd_jax.report.pages.paper.cases import (
    Cases,
    cache_aware,
    compared,
    dropped_in,
    level,
    mean_drop_in,
    mix_change,
    mix_order,
    most,
    nothing,
    on_frontier,
    read_as,
    scored_against_topk,
    small_differs,
)
from specmd_jax.report.pages.paper.points import READING, READING_SOFTWARE_MS, SYSTEMS
from specmd_jax.report.pages.paper.quality_cases import (
    MOVED,
    cache_aware_speed_up,
    dropped,
    priority_on_front,
    strength_in_range,
    substituted,
    unsafe,
)
from specmd_jax.report.pages.paper.results import MIDDLE, SMALL, Results
from specmd_jax.report.pages.quality.front import COLLAPSED, SAFE_PCT, collapsed, safe
from specmd_jax.report.verdicts import Judged, cut_pct, judge, ratio


class Claim(NamedTuple):
    """One claim: the paper's words in short, what is computed for it, and its cases on some traces."""

    section: str
    text: str
    paper: str
    measure: str
    cases: Cases
    with_number: bool = True
    unit: str = ""

    def judge(self, results: Results, traces: Sequence[str]) -> Judged:
        return judge(self.cases(results, traces), with_number=self.with_number)


def _range(found: paper.Range, unit: str = "") -> str:
    return f"{found.low:g} to {found.high:g}{unit}"


_RATES = paper.COLLISION_RATE_PCT_5PCT
CLAIMS = (
    Claim(
        "Collisions",
        "At 5 % Least-Stale (cyclic) has fewer collisions than LRU",
        f"{_range(paper.LRU_OVER_LEAST_STALE_5PCT)} times fewer",
        "LRU's collisions / Least-Stale's",
        compared("lru", "collisions", ratio, paper.LRU_OVER_LEAST_STALE_5PCT, 1.0, MIDDLE),
        unit="x",
    ),
    Claim(
        "Collisions",
        "The same for the literal reading",
        f"{_range(paper.LRU_OVER_LEAST_STALE_5PCT)} times fewer",
        "LRU's collisions / literal Least-Stale's",
        compared("lru", "collisions", ratio, paper.LRU_OVER_LEAST_STALE_5PCT, 1.0, MIDDLE, "least_stale_literal"),
        unit="x",
    ),
    Claim(
        "Collisions",
        "At 5 % Least-Stale has far fewer collisions than SB",
        f"{_range(paper.SCORE_OVER_LEAST_STALE_5PCT)} times fewer",
        "SB's collisions / Least-Stale's",
        compared("score", "collisions", ratio, paper.SCORE_OVER_LEAST_STALE_5PCT, 1.0, MIDDLE),
        unit="x",
    ),
    Claim(
        "Collisions",
        "At 1 % up to 85 times fewer collisions than LRU",
        "up to 85 times",
        "largest ratio of collisions at 1 %",
        most(compared("lru", "collisions", ratio, paper.Range(85.0, 85.0), 1.0, SMALL)),
        unit="x",
    ),
    *(
        Claim(
            "Collisions",
            f"Collision rate of {name} at 5 %",
            _range(_RATES[name], " %"),
            "collisions / misses",
            level(name, "collision_rate", _RATES[name]),
            unit="%",
        )
        for name in _RATES
    ),
    Claim(
        "Collisions",
        "At 5 % Least-Stale also misses less than LRU (implied by its rates and counts)",
        f"{_range(paper.FEWER_MISSES_PCT_5PCT)} % fewer misses",
        "total misses that Least-Stale saves against LRU",
        compared("lru", "misses", cut_pct, paper.FEWER_MISSES_PCT_5PCT, 0.0, MIDDLE),
        unit="%",
    ),
    Claim(
        "Collisions",
        "The literal reading also misses less than LRU",
        f"{_range(paper.FEWER_MISSES_PCT_5PCT)} % fewer misses",
        "total misses that literal Least-Stale saves against LRU",
        compared("lru", "misses", cut_pct, paper.FEWER_MISSES_PCT_5PCT, 0.0, MIDDLE, "least_stale_literal"),
        unit="%",
    ),
    Claim(
        "Collisions",
        "Least-Stale hits 88 to 92 % at 5 %",
        _range(paper.MISS_RATE_PCT, " % misses"),
        "misses / demand",
        level("least_stale", "hit_rate", paper.MISS_RATE_PCT, miss=True),
        unit="%",
    ),
    *(
        Claim(
            "Collisions",
            f"The same, read as: {bits:g}-bit slots, a predictor right 9 times in 10 that fetches 1.5x, {software}",
            _range(paper.MISS_RATE_PCT, " % misses"),
            "misses / demand",
            read_as(replace(READING, eviction="least_stale", bits=(bits,), software_ms=ms), paper.MISS_RATE_PCT),
            unit="%",
        )
        for bits, ms, software in (
            (4.0, READING_SOFTWARE_MS[-1], "2.4 ms of software for each expert that runs"),
            (4.0, 0.0, "no time of software"),
            (16.0, READING_SOFTWARE_MS[-1], "2.4 ms of software for each expert that runs"),
        )
    ),
    *(
        Claim(
            "Prefetch",
            f"Score-based prefetch has {word} than top-k (except on Mixtral)",
            word.split()[0],
            f"{column} of percentile 80 against top-k at 1 and 5 %, LRU",
            scored_against_topk(column, sign),
            with_number=False,
        )
        for word, column, sign in (
            ("lower precision", "prefetch_precision", -1),
            ("lower recall", "prefetch_recall", -1),
            ("more hits", "hits", 1),
            ("less stall", "stall_s", -1),
        )
    ),
    Claim(
        "Miss rules",
        "fetch-priority lies on the frontier of quality and speed",
        "on the frontier",
        "not dominated in TPOT, mean bits and lost mass (proxies of quality)",
        on_frontier,
        with_number=False,
    ),
    Claim(
        "Quality",
        "The same on held-out text: fetch-priority lies on the frontier",
        "on the frontier",
        "not dominated in TPOT and KL divergence by a miss rule or a precision",
        priority_on_front,
        with_number=False,
    ),
    Claim(
        "Quality",
        "Substitution collapses quality",
        "everywhere",
        f"perplexity at least {COLLAPSED:g} times as high, where {100 * MOVED:g} % of the gate mass moved",
        substituted(collapsed),
        with_number=False,
    ),
    Claim(
        "Quality",
        "The same, read as: substitution is not safe",
        "everywhere",
        f"more than {SAFE_PCT:g} % more bits per byte, where {100 * MOVED:g} % of the gate mass moved",
        substituted(unsafe),
        with_number=False,
    ),
    Claim(
        "Quality",
        "Dropping is safe from rank 3 on",
        "safe",
        f"at most {SAFE_PCT:g} % more bits per byte, ranks 3 and on dropped where they miss",
        dropped(2, safe),
        with_number=False,
    ),
    Claim(
        "Quality",
        "Dropping rank 2 as well is not safe",
        "not safe",
        f"more than {SAFE_PCT:g} % more bits per byte, ranks 2 and on dropped where they miss",
        dropped(1, unsafe),
        with_number=False,
    ),
    Claim(
        "Quality",
        "Wider mixtures tolerate more",
        "by number of experts",
        "needs trained models of several widths, and there is one",
        nothing,
    ),
    Claim(
        "Five mixes",
        "Order of the mixes by TTFT",
        "as in its table",
        "Kendall's tau with the paper's order",
        mix_order("ttft_s", 0),
    ),
    Claim(
        "Five mixes",
        "Order of the mixes by tokens a second",
        "as in its table",
        "Kendall's tau with the paper's order",
        mix_order("tokens_per_s", 1),
    ),
    Claim(
        "Five mixes",
        "TTFT of each mix against #1",
        "as in its table",
        "change of TTFT against #1",
        mix_change,
        unit="%",
    ),
    Claim(
        "Five mixes",
        "Milliseconds of its tables",
        "see the tables",
        "they contain 1 to 2.4 ms of software overhead an expert: only ratios and orders are compared",
        nothing,
    ),
    *(
        Claim(
            "Drop-in",
            f"Least-Stale in {system} lowers TTFT at 5 %",
            _range(paper.Range(min(cuts), max(cuts)), " %"),
            "TTFT saved (without prompts: TPOT)",
            dropped_in([system]),
            unit="%",
        )
        for system in SYSTEMS
        for cuts in [[round(cut_pct(*times), 1) for times in paper.TTFT_MS[system].values()]]
    ),
    Claim(
        "Drop-in",
        "17 % less TTFT on average over systems and models",
        f"{paper.MEAN_TTFT_CUT_PCT:g} %",
        "mean of TTFT saved",
        mean_drop_in,
        unit="%",
    ),
    Claim(
        "Drop-in",
        "Up to 34.7 % less TTFT (its headline; 44.1 % stands in its table)",
        f"{paper.MOST_TTFT_CUT_PCT:g} %",
        "largest TTFT saved",
        most(
            lambda results, traces: [
                case._replace(low=paper.MOST_TTFT_CUT_PCT, high=paper.MOST_TTFT_CUT_PCT)
                for case in dropped_in(tuple(SYSTEMS))(results, traces)
            ]
        ),
        unit="%",
    ),
    Claim(
        "Routing",
        "Cache-aware routing gives 10 to 20 % of the speed-up (read as: of TTFT)",
        _range(paper.CACHE_AWARE_SPEED_UP_PCT, " %"),
        "TTFT without it / with it - 1 (LRU, no prefetch, 5 %)",
        cache_aware("ttft_s"),
        unit="%",
    ),
    Claim(
        "Routing",
        "The same, read as: of decoding",
        _range(paper.CACHE_AWARE_SPEED_UP_PCT, " %"),
        "TPOT without it / with it - 1 (LRU, no prefetch, 5 %)",
        cache_aware("tpot_s"),
        unit="%",
    ),
    Claim(
        "Routing",
        "The same of decoding, where the model goes on with what it was routed to",
        _range(paper.CACHE_AWARE_SPEED_UP_PCT, " %"),
        f"TPOT without it / with it - 1 (LRU, no prefetch, 5 %, {_range(paper.CACHE_AWARE_STRENGTHS)})",
        cache_aware_speed_up,
        unit="%",
    ),
    Claim(
        "Routing",
        f"A strength of {_range(paper.CACHE_AWARE_STRENGTHS)} works best",
        _range(paper.CACHE_AWARE_STRENGTHS),
        f"the fastest strength with at most {SAFE_PCT:g} % more bits per byte",
        strength_in_range,
        with_number=False,
    ),
    Claim(
        "Regimes",
        "The best eviction at 1 % is not the best at 5 or 25 %",
        "differs",
        "fewest misses among online policies; capacities where all tie are left out",
        small_differs,
        with_number=False,
    ),
)
"""Every claim. `nothing` marks those that a simulator cannot test."""
