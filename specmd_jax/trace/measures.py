"""What the routing of a trace is like, counted token by token: reuse, overlap, evenness of use, experts of a domain.

Everything is of one layer's experts and of one request at a time: the first use in a request is a first use. Tokens
come one after another, prompts among them, as decoding would read them.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.select import uses_of
from specmd_jax.types import Trace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
DRAWS = 200  # of routing that is uniform
NEW = -1


class Reuse(NamedTuple):
    """[N, L, K] of each use; `NEW` at an expert's first use in a request, and where no expert is used."""

    experts: Ints  # distinct other experts of the layer that the tokens in between used
    tokens: Ints  # tokens from the last use to this one: 1 is the next token


def used(trace: Trace) -> npt.NDArray[np.bool_]:
    """Gives which experts each token uses, [N, L, E]."""
    found = np.zeros((trace.tokens, trace.layers, trace.experts + 1), np.bool_)
    np.put_along_axis(found, trace.expert_ids.astype(np.int64), True, axis=-1)  # -1 goes to the last place
    return found[..., :-1]


def starts_of(trace: Trace) -> Ints:
    """Gives the first token of each request and, behind them, N: [R + 1]."""
    return np.concatenate([[0], np.cumsum(trace.lengths, dtype=np.int64)])


def reuse(trace: Trace) -> Reuse:
    """Gives how far back the last use of each used expert lies. LRU with C experts of a layer hits, tokens one after
    another, wherever ``experts`` + the experts of the token of the last use are at most C.
    """
    ids = trace.expert_ids.astype(np.int64)
    found = Reuse(np.full(ids.shape, NEW), np.full(ids.shape, NEW))
    rows = np.arange(trace.layers)[:, None]
    for begin, end in itertools.pairwise(starts_of(trace)):
        last = np.full((trace.layers, trace.experts), NEW)  # token of the last use
        for token in range(begin, end):
            here = ids[token]
            before = last[rows, here]  # [L, K]
            again = (before != NEW) & (here >= 0)
            later = (last[:, None, :] > before[:, :, None]).sum(axis=-1)
            found.experts[token] = np.where(again, later, NEW)
            found.tokens[token] = np.where(again, token - before, NEW)
            at, which = np.nonzero(here >= 0)
            last[at, here[at, which]] = token
    return found


def overlap(trace: Trace, lag: int) -> Floats:
    """Gives [L], of the experts that a token uses the share that the token ``lag`` before it in its request used, too.

    NaN for a layer where no two such tokens use any.
    """
    each, starts = used(trace), starts_of(trace)
    place = np.arange(trace.tokens) - np.repeat(starts[:-1], trace.lengths)
    now = np.flatnonzero(place >= lag)
    here, before = each[now], each[now - lag]
    there = here.any(axis=-1) & before.any(axis=-1)  # [n, L]
    both = (here & before).sum(axis=-1) * there
    return _share(both.sum(axis=0), (here.sum(axis=-1) * there).sum(axis=0))


def chance_overlap(trace: Trace) -> Floats:
    """Gives [L], what `overlap` would be of tokens that have nothing to do with each other but how often each expert of
    the layer is used.
    """
    uses = uses_of(trace.expert_ids, trace.experts).astype(np.float64)
    tokens = (trace.expert_ids >= 0).any(axis=-1).sum(axis=0)  # [L]
    return _share((uses**2).sum(axis=1), tokens * uses.sum(axis=1))


def entropy_bits(uses: npt.ArrayLike) -> Floats:
    """Gives the entropy of counts [..., E] along the last axis, in bits; NaN where there are none."""
    counts = np.asarray(uses, np.float64)
    share = _share(counts, counts.sum(axis=-1, keepdims=True))
    return -np.where(
        share > 0, share * np.log2(np.where(share > 0, share, 1)), np.where(np.isnan(share), np.nan, 0)
    ).sum(axis=-1)


@functools.lru_cache
def uniform_entropy_bits(tokens: int, experts: int, top_k: int) -> float:
    """Gives the mean entropy, in bits, of what ``tokens`` tokens use that each choose any ``top_k`` experts: below
    log2(E), as few tokens cannot use all experts alike. Drawn, from a fixed seed.
    """
    draw = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS if tokens < 1000 else 4):
        chosen = np.argsort(draw.random((tokens, experts)), axis=1)[:, :top_k]
        found.append(entropy_bits(np.bincount(chosen.ravel(), minlength=experts)))
    return float(np.mean(found))


def evenness(trace: Trace) -> Floats:
    """Gives [L], the entropy of a layer's use over the whole trace as a share of what uniform choices would have."""
    uses = uses_of(trace.expert_ids, trace.experts)
    tokens = (trace.expert_ids >= 0).any(axis=-1).sum(axis=0)
    return np.array([
        _of_uniform(float(entropy_bits(row)), int(count), trace) for row, count in zip(uses, tokens, strict=True)
    ])  # fmt: skip


def evenness_in_time(trace: Trace, window: int) -> Floats:
    """Gives [places, L], the same of ``window`` tokens in a row, by where in a request they lie, mean over requests.

    Windows do not overlap; what is left of a request behind its last whole window is not counted. No request that is
    long enough leaves no place.
    """
    starts = starts_of(trace)
    places = int(trace.lengths.max()) // window
    total, count = np.zeros((places, trace.layers)), np.zeros((places, trace.layers))
    for begin, length in zip(starts, trace.lengths, strict=False):
        for place in range(int(length) // window):
            ids = trace.expert_ids[begin + place * window : begin + (place + 1) * window]
            whole = (ids >= 0).any(axis=-1).all(axis=0)  # [L] every token uses the layer
            found = entropy_bits(uses_of(ids, trace.experts)) / uniform_entropy_bits(window, trace.experts, trace.top_k)
            total[place] += np.where(whole, np.nan_to_num(found), 0)
            count[place] += whole
    return _share(total, count)


class Domains(NamedTuple):
    """What the experts of a trace are used for. Domains count alike, however many tokens each has."""

    names: tuple[str, ...]  # of the d domains
    shares: Floats  # [L, E, d] of an expert's use, the part that comes from each domain; NaN: never used
    bits: Floats  # [L] what an expert that is used says about the domain (mutual information)
    chance_bits: Floats  # [L] the same where requests are dealt to domains at random; NaN: a request per domain


def domains(trace: Trace, names: npt.NDArray[np.str_], draws: int = 20) -> Domains:
    """Gives what the experts are used for, by the domain of each request ``names`` [R].

    Texts differ even within a domain, so requests that are dealt at random have some bits, too: ``chance_bits`` is the
    mean of ``draws`` such deals, from a fixed seed.
    Raises SpecmdError for fewer than two domains.
    """
    kinds = tuple(dict.fromkeys(names.tolist()))
    if len(kinds) < 2:
        raise SpecmdError(f"{trace.model}: {len(kinds)} domain, expected at least 2")
    starts = starts_of(trace)
    each = np.stack([
        uses_of(trace.expert_ids[begin:end], trace.experts) for begin, end in itertools.pairwise(starts)
    ])  # fmt: skip
    rows = np.array([kinds.index(name) for name in names.tolist()])
    joint = _joint(each, rows, len(kinds))
    chance = np.full(trace.layers, np.nan)
    if len(rows) > len(kinds):
        draw = np.random.default_rng(0)
        chance = np.mean([_information(_joint(each, draw.permutation(rows), len(kinds))) for _ in range(draws)], axis=0)
    shares = _share(joint, joint.sum(axis=0, keepdims=True))
    return Domains(kinds, np.moveaxis(shares, 0, -1), _information(joint), chance)


def _joint(each: Ints, rows: Ints, count: int) -> Floats:
    """Gives [d, L, E], the distribution of (domain, expert) of each layer, of uses [R, L, E]; each domain has 1/d."""
    found = np.zeros((count, *each.shape[1:]))
    np.add.at(found, rows, each)
    return _share(found, found.sum(axis=-1, keepdims=True) * count)


def _information(joint: Floats) -> Floats:
    """Gives [L] bits of mutual information between the domain and the expert, of [d, L, E]."""
    of_expert, of_domain = joint.sum(axis=0, keepdims=True), joint.sum(axis=-1, keepdims=True)
    ratio = _share(joint, of_expert * of_domain)
    return np.where(joint > 0, joint * np.log2(np.where(joint > 0, ratio, 1)), 0).sum(axis=(0, -1))


def _of_uniform(bits: float, tokens: int, trace: Trace) -> float:
    return bits / uniform_entropy_bits(tokens, trace.experts, trace.top_k) if tokens else float("nan")


def _share(part: npt.NDArray[np.number], whole: npt.NDArray[np.number]) -> Floats:
    """Gives part / whole, NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
