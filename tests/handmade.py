"""Schedules from plain lists, by the letter of section 1 of the contract and without its implementation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from specmd_jax.types import DECODE, NEVER, PREFILL, Schedule

Token = Sequence[Sequence[int]]  # [L] expert ids by falling gate; none, or -1, for a skipped layer
Gates = Sequence[Sequence[float]]  # [L] their gates


def decode_schedule(
    ids: Sequence[Token], layers: int, experts: int, gates: Sequence[Gates] | None = None, **rest: Any
) -> Schedule:
    """Each token its own decode pass: ids is [N][L], gates the same (default 1/K). `rest` goes to `pass_schedule`."""
    per_pass = None if gates is None else [[token] for token in gates]
    return pass_schedule([[token] for token in ids], layers, experts, per_pass, **rest)


def pass_schedule(
    passes: Sequence[Sequence[Token]],
    layers: int,
    experts: int,
    gates: Sequence[Sequence[Gates]] | None = None,
    *,
    order: str = "atomic",
    prefills: Collection[int] | None = None,
    resets: Collection[int] = (),
    ahead: Any = None,
    logits: Any = None,
) -> Schedule:
    """One visit a pass and layer, or one a demanded expert.

    Args:
        passes: [P][T][L] lists of ids.
        gates: the same nesting; by default each is 1/K, K being the longest list of ids.
        order: "atomic", "sequential" (by first position) or "sequential-id".
        prefills: passes that are prefills, by default those of several tokens.
        resets: passes before which the cache is emptied; each begins a request.
        ahead: [P, L, E] next-layer scores, already summed over the tokens.
        logits: [P][T][L][E] router logits of each token.
    """
    top_k = max((len(route) for tokens in passes for token in tokens for route in token), default=1) or 1
    most_tokens = max((len(tokens) for tokens in passes), default=1)
    rows: list[dict[str, Any]] = []
    clock = request = 0
    for p, tokens in enumerate(passes):
        request += p > 0 and p in resets
        first_of_pass = True
        for layer in range(layers):
            count, mass, first, last, position = {}, {}, {}, {}, 0
            for t, token in enumerate(tokens):
                for k, e in enumerate(token[layer]):
                    if e < 0:
                        continue
                    gate = np.float32(1 / top_k if gates is None else gates[p][t][layer][k])
                    count[e] = count.get(e, 0) + 1
                    mass[e] = mass.get(e, np.float32(0)) + gate
                    first.setdefault(e, position)
                    last[e] = position
                    position += 1
            by_last = sorted(last, key=lambda e: last[e])
            if order == "atomic" or not count:
                events = [by_last]
            elif order == "sequential":
                events = [[e] for e in sorted(first, key=lambda e: first[e])]
            elif order == "sequential-id":
                events = [[e] for e in sorted(count)]
            else:
                raise ValueError(f"unknown order {order!r}")
            for i, demand in enumerate(events):
                rows.append(
                    {
                        "layer": layer,
                        "pass_id": p,
                        "phase": PREFILL if (len(tokens) > 1 if prefills is None else p in prefills) else DECODE,
                        "request": request,
                        "tokens": len(tokens),
                        "clock": clock,
                        "starts_pass": first_of_pass,
                        "ends_layer": i == len(events) - 1,
                        "reset": first_of_pass and p in resets,
                        "demand": demand,
                        "count": count,
                        "mass": mass,
                    }
                )
                clock += len(demand) + 1
                first_of_pass = False

    visits = len(rows)
    most = max((len(row["demand"]) for row in rows), default=0) or 1
    table = {
        "count": np.zeros((visits, experts), np.int32),
        "mass": np.zeros((visits, experts), np.float32),
        "rank": np.full((visits, experts), -1, np.int32),
        "next_use": np.full((visits, experts), NEVER, np.int32),
        "by_mass": np.full((visits, most), -1, np.int32),
    }
    upcoming: dict[tuple[int, int], int] = {}
    for v in reversed(range(visits)):
        row = rows[v]
        for rank, e in enumerate(row["demand"]):
            table["count"][v, e] = row["count"][e]
            table["mass"][v, e] = row["mass"][e]
            table["rank"][v, e] = rank
            table["next_use"][v, e] = upcoming.get((row["layer"], e), NEVER)
            upcoming[row["layer"], e] = v
        for i, e in enumerate(sorted(row["demand"], key=lambda e: (-row["mass"][e], e))):
            table["by_mass"][v, i] = e

    def column(name: str, dtype: Any) -> Any:
        return np.array([row[name] for row in rows], dtype)

    scores = None if ahead is None else np.array([ahead[r["pass_id"]][r["layer"]] for r in rows], np.float32)
    full = None
    if logits is not None:
        full = np.full((visits, most_tokens, experts), np.nan, np.float32)
        for v, row in enumerate(rows):
            for t, token in enumerate(logits[row["pass_id"]]):
                full[v, t] = token[row["layer"]]
    return Schedule(
        layers=layers,
        experts=experts,
        most=most,
        layer=column("layer", np.int32),
        pass_id=column("pass_id", np.int32),
        phase=column("phase", np.int8),
        request=column("request", np.int32),
        tokens=column("tokens", np.int32),
        clock=column("clock", np.int32),
        starts_pass=column("starts_pass", np.bool_),
        ends_layer=column("ends_layer", np.bool_),
        reset=column("reset", np.bool_),
        counted=np.ones(visits, np.bool_),
        ahead=scores,
        logits=full,
        **table,
    )
