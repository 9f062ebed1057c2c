"""Numbers that SpecMD (arXiv 2602.03921v1) reports, and where they stand in it. All were measured by its authors.

Times are milliseconds on one A100-80GB with its cache limited in software and a link of about 5 GB/s; they contain 1 to
2.4 ms of software overhead for each expert, so only their ratios and orders can be compared with a simulation.
"""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """What the paper reports for one quantity over its models and tasks: the lowest and the highest."""

    low: float
    high: float


MODELS = ("OLMoE-1B-7B", "Mixtral-8x7B", "Qwen1.5-MoE-A2.7B", "Phi-3.5-MoE")
CAPACITIES_PCT = (1.0, 5.0, 25.0)  # of the bytes of all experts at 16 bits

# collisions by eviction policy
LRU_OVER_LEAST_STALE_5PCT = Range(2.6, 8.6)  # collision counts
SCORE_OVER_LEAST_STALE_5PCT = Range(58.0, 91.0)  # collision counts
COLLISION_RATE_PCT_5PCT = {
    "least_stale": Range(1.6, 1.9),
    "lru": Range(4.5, 12.6),
    "score": Range(42.6, 60.9),
}
FEWER_MISSES_PCT_5PCT = Range(8.0, 9.0)  # implied by the two lines above, if a rate is collisions / misses
MISS_RATE_PCT = Range(8.0, 12.0)  # from hit rates of 88 to 92 %
MEAN_TTFT_CUT_PCT = 17.0
MOST_TTFT_CUT_PCT = 34.7

# Least-Stale as a drop-in replacement, TTFT
TTFT_MS: dict[str, dict[str, tuple[float, float]]] = {
    # system -> model -> (as published, with Least-Stale in place of its eviction)
    "Eliseev": {
        "OLMoE-1B-7B": (3076.8, 2748.1),
        "Mixtral-8x7B": (4238.0, 3485.2),
        "Phi-3.5-MoE": (4451.7, 3791.1),
        "Qwen1.5-MoE-A2.7B": (3724.0, 3433.4),
    },
    "Zhu": {
        "OLMoE-1B-7B": (2257.2, 1473.1),
        "Mixtral-8x7B": (1620.3, 1460.8),
        "Phi-3.5-MoE": (1905.6, 1987.6),
        "Qwen1.5-MoE-A2.7B": (2739.2, 2620.9),
    },
    "HOBBIT": {
        "OLMoE-1B-7B": (1590.1, 1309.2),
        "Mixtral-8x7B": (2321.7, 1725.2),
        "Phi-3.5-MoE": (3458.6, 1933.6),
        "Qwen1.5-MoE-A2.7B": (2492.0, 2033.7),
    },
    "MixtureCache": {
        "OLMoE-1B-7B": (2664.6, 2297.5),
        "Mixtral-8x7B": (4332.6, 3573.2),
        "Phi-3.5-MoE": (5025.3, 3791.1),
        "Qwen1.5-MoE-A2.7B": (3488.6, 2685.4),
    },
}

# the five mixes at 5 %
MIX_TTFT_MS_AND_TOKENS_PER_S: dict[str, dict[str, tuple[float, float]]] = {
    # mix -> model -> (TTFT, decoded tokens per second)
    "baseline": {
        "OLMoE-1B-7B": (3166, 1.5),
        "Mixtral-8x7B": (10296, 0.4),
        "Phi-3.5-MoE": (7902, 0.8),
        "Qwen1.5-MoE-A2.7B": (5728, 2.3),
    },
    "#1": {
        "OLMoE-1B-7B": (3077, 1.91),
        "Mixtral-8x7B": (4238, 0.98),
        "Phi-3.5-MoE": (4452, 1.69),
        "Qwen1.5-MoE-A2.7B": (3724, 2.89),
    },
    "#2": {
        "OLMoE-1B-7B": (2257, 1.22),
        "Mixtral-8x7B": (1620, 0.75),
        "Phi-3.5-MoE": (1906, 0.86),
        "Qwen1.5-MoE-A2.7B": (2739, 1.11),
    },
    "#3": {
        "OLMoE-1B-7B": (1590, 1.34),
        "Mixtral-8x7B": (2322, 0.71),
        "Phi-3.5-MoE": (3459, 1.05),
        "Qwen1.5-MoE-A2.7B": (2492, 2.19),
    },
    "#4": {
        "OLMoE-1B-7B": (2665, 2.33),
        "Mixtral-8x7B": (4333, 1.07),
        "Phi-3.5-MoE": (5025, 1.72),
        "Qwen1.5-MoE-A2.7B": (3489, 3.50),
    },
    "#5": {
        "OLMoE-1B-7B": (2220, 1.69),
        "Mixtral-8x7B": (3044, 1.42),
        "Phi-3.5-MoE": (3863, 1.11),
        "Qwen1.5-MoE-A2.7B": (2893, 2.11),
    },
}

CACHE_AWARE_STRENGTHS = Range(0.1, 0.5)  # that work best
CACHE_AWARE_SPEED_UP_PCT = Range(10.0, 20.0)
