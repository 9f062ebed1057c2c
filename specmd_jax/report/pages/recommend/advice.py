"""Rows of a recommendation -> tables and plain words. Every reason is a rule over the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.recommend.elsewhere import Holdings, elsewhere
from specmd_jax.report.pages.recommend.front import front
from specmd_jax.report.pages.recommend.reasons import change, mix, percent, reason
from specmd_jax.report.pages.recommend.ties import best_of, each, interval, rank, tied
from specmd_jax.report.rows import mix_name, number
from specmd_jax.report.terminal import aligned
from specmd_jax.units import GB, GIB, MIB

_SPEED_HEAD = ("TTFT s", "TPOT ms", "tok/s", "MiB/token", "stall %")


class Answer(NamedTuple):
    """Rows of `experiments.recommend`, sorted out."""

    grid: list[Row]  # the candidates at every capacity
    here: list[Row]  # of them, those at the capacity asked for, fastest first
    others: list[Row]  # what was changed about the best one
    target_s: float | None
    reach: Row | None  # the least memory that decodes a token in `target_s`
    asked: Mapping[str, Any]  # settings, and what was worked out of them

    @property
    def best(self) -> Row:
        """The plainest of those that tie with the fastest."""
        return best_of(self.here)

    @property
    def lru(self) -> Row | None:
        """Plain LRU at the same capacity."""
        return next((row for row in self.here if mix(row) == ("lru", "none")), None)

    def studied(self, name: str) -> list[Row]:
        """Gives the rows of a study beside the answer."""
        return [row for row in self.others if row["study"] == name]


def sort_out(rows: Sequence[Row], asked: Mapping[str, Any]) -> Answer:
    """`asked` is what the manifest has of the settings."""
    target_s = None if asked["target_tpot_ms"] is None else asked["target_tpot_ms"] / 1e3
    grid = [row for row in rows if row["study"] == "grid"]
    here = sorted((row for row in grid if row["capacity_bytes"] == asked["capacity_bytes"]), key=rank)
    others = [row for row in rows if row["study"] != "grid"]
    fast = [] if target_s is None else [row for row in front(grid, "tpot_s") if number(row, "tpot_s") <= target_s]
    return Answer(grid, here, others, target_s, fast[0] if fast else None, asked)


def headline(answer: Answer) -> str:
    """Gives the answer in one line."""
    best = answer.best
    ahead = "" if best["prefetch"] == "none" else f" with {best['prefetch']} prefetching"
    return (
        f"Run {best['eviction']}{ahead}: {rate_of(best)}, with {number(best, 'capacity_pct'):.0f} % of the experts of "
        f"{best['model']} at {answer.asked['weight_bits']:.3g} bits in {number(best, 'memory_bytes') / GIB:.4g} GiB "
        f"{_behind(answer)}on {best['hardware']}, context {answer.asked['context']}; {best['evidence']}"
    )


def _behind(answer: Answer) -> str:
    """Names host memory and storage where not all experts are in host memory."""
    held = answer.asked.get("host_bytes")
    return "" if held is None else f"and {held / GIB:.4g} GiB of host memory before {answer.asked['ssd']}, "


def on_host(answer: Answer) -> str | None:
    """Says in one line what an engine would reach that computes misses on the host's processor, if that is faster."""
    best, found = answer.best, answer.studied("host")
    fastest = min(found, key=rank, default=best)
    if rank(fastest) >= rank(best) or tied(fastest, best):
        return None
    return (
        f"An engine that computes misses on the host's processor ({variant_of(fastest)}) would be faster there: "
        f"{rate_of(fastest)}, {-100 * change(fastest, best):.0f} % less time"
    )


def meaning(answer: Answer) -> list[str]:
    """Gives what the answer means, a sentence each: who waits for what, what else is as fast, what LRU would give."""
    best, lru = answer.best, answer.lru
    equal = [row for row in answer.here if row is not best and tied(row, best)]
    lines = list(answer.asked.get("seen", ()))
    lines += [f"with a warm cache the device waits {percent(best, 'stall_share'):.0f} % of the time"]
    if answer.asked.get("host_bytes") is not None:
        read = 100 * number(best, "host_misses") / max(number(best, "misses"), 1)
        lines.append(
            f"{read:.0f} % of the misses are read from storage, which is busy "
            f"{percent(best, 'storage_utilisation'):.0f} % of the time"
        )
    whole = [row for row in answer.grid if number(row, "capacity_pct") >= 100]
    if whole and best not in whole:
        fast = min(whole, key=rank)
        share = 100 * number(fast, "tpot_s") / number(best, "tpot_s")
        lines.append(
            f"if all experts fitted ({number(fast, 'memory_bytes') / GIB:.1f} GiB): {rate_of(fast)}; this is "
            f"{share:.0f} % of that speed"
        )
    if equal:
        lines.append(f"as fast, within what the requests tell: {', '.join(mix_name(*mix(row)) for row in equal)}")
    if lru is not None and lru is not best:
        lines.append(
            f"plain LRU, which most engines with a cache of experts have, instead: {rate_of(lru)}, "
            f"{100 * change(lru, best):.0f} % more time"
        )
        lines.append(room_to_decide(answer, lru))
    return lines


def room_to_decide(answer: Answer, lru: Row) -> str:
    """Says how long the policy may take to decide, which no replay counts, before it is no faster than plainer ones."""
    best, (layers, *_) = answer.best, answer.asked["shape"]

    def more_us(row: Row) -> str:
        more_s = number(row, "tpot_s") - number(best, "tpot_s")
        return f"{1e6 * more_s / layers:.0f} us a layer more than {row['eviction']}"

    plainer = [row for row in answer.here if row["prefetch"] == "none" and not tied(row, best)]
    near = min(plainer, key=rank, default=lru)
    told = more_us(lru) if near is lru else f"{more_us(near)}, or {more_us(lru)}"
    return f"what a policy itself takes to decide is not counted: this one may take {told}, before those are as fast"


def advice(answer: Answer) -> str:
    """Gives the answer: in one line, what it means, where the memory goes, and the ranked table."""
    best = answer.best
    lines = [headline(answer), *(f"  {line}" for line in meaning(answer))]
    ranked = [
        (
            "=" if tied(row, best) and row is not best else str(place),
            *mix(row),
            *_speed(row),
            spread_of(row),
            f"{percent(row, 'hit_rate'):.1f}",
            reason(row, answer.here),
        )
        for place, row in enumerate(sorted(answer.here, key=lambda row: (row is not best, rank(row))), start=1)
    ]
    lines += [
        "",
        *memory_lines(answer),
        "",
        "The same memory elsewhere (nearest setting, from sizes alone; no speed is meant):",
    ]
    lines += [f"  {line}" for line in elsewhere(holdings_of(answer))]
    lines += ["", f"Best first; = is a tie with the first; 95 % intervals over requests ({best['evidence']}):"]
    lines += aligned(("", "eviction", "prefetch", *_SPEED_HEAD, "TPOT interval", "hit %", "why"), ranked)
    return "\n".join(lines)


def beside(answer: Answer) -> str:
    """Gives what more memory buys, the target, the cold start, and how the answer moves."""
    best = answer.best
    steps = [
        (
            f"{number(row, 'memory_bytes') / GIB:.2f}",
            f"{number(row, 'capacity_pct'):.1f}",
            f"{number(row, 'cycles'):.2f}",
            *mix(row),
            *_speed(row),
        )
        for row in front(answer.grid, "tpot_s")
    ]
    moved = [("as asked", f"event, {number(best, 'slot_bits'):.3g} bits", *_speed(best), "", "")]
    moved += [
        (str(row["study"]), variant_of(row), *_speed(row), moved_by(row, best), proxies_of(row))
        for row in answer.others
        if row["study"] not in ("cold",)
    ]
    lines = [f"What more or less memory buys, Pareto front of TPOT against memory ({best['evidence']}):"]
    lines += aligned(("GiB", "% cached", "C/T", "eviction", "prefetch", *_SPEED_HEAD), steps)
    if answer.target_s is not None:
        lines += ["", target_line(answer)]
    lines += ["", *cold_lines(answer)]
    named = f"How the answer moves, {mix_name(*mix(best))} unless named, same cache bytes ({best['evidence']}):"
    lines += [named, *aligned(("what", "", *_SPEED_HEAD, "change of TPOT", "proxies of quality"), moved)]
    return "\n".join(lines)


def memory_lines(answer: Answer) -> list[str]:
    """Gives the arithmetic of the memory."""
    asked, best, assumed = answer.asked, answer.best, answer.asked["assumed"]
    layers, experts, top_k = asked["shape"]
    left = asked["memory_bytes"] - sum(asked["parts"].values())
    lines = [
        f"{best['model']}: {layers} layers of {experts} experts of {asked['expert_bytes'] / MIB:.1f} MiB "
        f"({asked['weight_bits']:.3g} bits a weight), top-{top_k}",
        f"  {asked['memory_bytes'] / GIB:8.2f} GiB  accelerator memory",
        *(
            f"- {size / GIB:8.2f} GiB  {name}{f' (assumed: {assumed[name]})' if name in assumed else ''}"
            for name, size in asked["parts"].items()
        ),
        f"= {left / GIB:8.2f} GiB  for cached experts: {number(best, 'capacity_pct'):.1f} % of them, "
        f"{number(best, 'cycles'):.2f} token cycles",
    ]
    if not asked["context"]:
        lines.append("  no context is counted: its keys and values would share the memory")
    return lines


def holdings_of(answer: Answer) -> Holdings:
    layers, experts, _ = answer.asked["shape"]
    weights = ("dense layers", "head", "embedding")
    fixed = sum(size for name, size in answer.asked["parts"].items() if name in weights)
    return Holdings(layers, experts, answer.asked["expert_bytes"], answer.asked["capacity_bytes"], fixed)


def cold_lines(answer: Answer) -> list[str]:
    """Says what the first request takes, where that was replayed."""
    best, found = answer.best, [row for row in answer.studied("cold") if mix(row) == mix(answer.best)]
    if not found:
        return []
    cold, rate = found[0], answer.asked["link_bytes_per_s"]
    warm_s = each(best, "request_decode_s")[0] / max(each(best, "request_decodes")[0], 1)
    return [
        f"From an empty cache the first request misses {number(cold, 'misses'):.0f} experts: "
        f"{number(cold, 'ttft_s'):.3g} s to its first token (the same request warm: "
        f"{each(best, 'request_prefill_s')[0]:.3g} s), then {1e3 * number(cold, 'tpot_s'):.1f} ms a token (warm: "
        f"{1e3 * warm_s:.1f} ms). Filling the cache alone takes the link "
        f"{number(best, 'capacity_bytes') / rate:.2g} s at {rate / GB:.3g} GB/s.",
        "",
    ]


def target_line(answer: Answer) -> str:
    assert answer.target_s is not None
    asked = f"Target TPOT {1e3 * answer.target_s:g} ms:"
    if answer.reach is None:
        fastest = 1e3 * min(number(row, "tpot_s") for row in answer.grid)
        return f"{asked} out of reach; the fastest tried takes {fastest:.2f} ms ({answer.best['evidence']})"
    reach = answer.reach
    return (
        f"{asked} the least memory tried that reaches it is {number(reach, 'memory_bytes') / GIB:.2f} GiB, a cache of "
        f"{number(reach, 'capacity_pct'):.1f} % of the experts, {' + '.join(mix(reach))}: "
        f"{1e3 * number(reach, 'tpot_s'):.2f} ms ({reach['evidence']})"
    )


def rate_of(row: Row) -> str:
    ends = interval(row)
    spread = "" if ends is None else f", {1e3 * ends[0]:.1f} to {1e3 * ends[1]:.1f} over requests"
    return f"{number(row, 'tokens_per_s'):.1f} tokens/s ({1e3 * number(row, 'tpot_s'):.1f} ms a token{spread})"


def spread_of(row: Row) -> str:
    ends = interval(row)
    return "-" if ends is None else f"{1e3 * ends[0]:.2f} to {1e3 * ends[1]:.2f}"


def _speed(row: Row) -> tuple[str, ...]:
    """Under `_SPEED_HEAD`."""
    return (
        f"{number(row, 'ttft_s'):.3g}",
        f"{1e3 * number(row, 'tpot_s'):.2f}",
        f"{number(row, 'tokens_per_s'):.1f}",
        f"{number(row, 'bytes_per_token') / MIB:.1f}",
        f"{percent(row, 'stall_share'):.0f}",
    )


def moved_by(row: Row, best: Row) -> str:
    return "a tie" if tied(row, best) else f"{100 * change(row, best):+.1f} %"


def variant_of(row: Row) -> str:
    named = {
        "lossy": f"{row['miss']}, {row['variant']}",
        "reading": f"least_stale {row['variant']}",
        "bound": f"{row['eviction']}, {row['variant']}",
        "host": f"{row['miss']}: {row['variant']}",
    }
    return named.get(str(row["study"]), str(row["variant"]))


def proxies_of(row: Row) -> str:
    if row["study"] not in ("lossy", "precision"):
        return ""
    lost = f"{percent(row, 'lost_mass'):.1f} % of gate mass lost, " if row["study"] == "lossy" else ""
    return f"{lost}{number(row, 'mean_bits'):.2f} bits on average"
