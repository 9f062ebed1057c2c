"""What recordings get wrong, in one place for all formats: each kind is refused, mended, warned of or taken out.

========== ============================================================================= =========== ===========
kind       what it is                                                                    by default  on request
========== ============================================================================= =========== ===========
padding    tokens with one id k times in all layers: rows that a client filled up        refused     taken out
shared     a fused shared expert: an id from E on in the last column of every row        refused     column out
ranking    prompt rows that are one token's whole ranking, read past a strided view      refused     prompt out
nan        tokens with experts 0 to k-1 in all layers: the router saw NaN                warned of   taken out
repeats    decoded tokens like the one before in all layers: a captured graph's row      warned of   taken out
profiling  alike tokens in front of everything: the engine measured its memory           warned of   taken out
drafts     rows of drafts that were rejected                                             warned of   taken out
========== ============================================================================= =========== ===========

A cell of only 255 or 65535, and these where they are no expert, are -1 that became unsigned: no expert. Ids from -128
to -2 are ids from 128 on, read as int8: refused. Layers that no token routes in (-1, or zeros throughout) are dense:
left out, and ``meta["layer_numbers"]`` has the others. What was found is in ``meta["warnings"]``, a line each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from specmd_jax.errors import SpecmdError, find
from specmd_jax.trace.importers import suspects
from specmd_jax.trace.importers.suspects import Mask
from specmd_jax.trace.validate import validate
from specmd_jax.types import Trace

STRIPPABLE: Mapping[str, str] = {
    "padding": "tokens that are padding",
    "shared": "the column of a fused shared expert, which is dense",
    "ranking": "prompts whose rows are one token's whole ranking",
    "nan": "tokens whose router saw NaN",
    "repeats": "decoded tokens that repeat the one before in all layers",
    "profiling": "alike tokens before the first request",
    "drafts": "drafts that were rejected",
}
"""What is taken out on request: kind -> what it is."""

_UNSIGNED = (255, 65535)  # what -1 becomes


class Known(NamedTuple):
    """What a reader knows of a file and its arrays do not say."""

    phases: bool = True  # prompt tokens are told from decoded ones
    token_breaks: bool = True  # where a token ends is recorded, not concluded
    interleaved: bool = False  # rows of several requests alternate in the file
    notes: tuple[str, ...] = ()  # what else to warn of
    rejected: Mask | None = None  # [N] rows of drafts that were not kept


FULL = Known()


def strip_kinds(given: str | Collection[str] | None) -> frozenset[str]:
    """Reads what to take out: names of `STRIPPABLE`, or a text of them with commas; ``all`` is every one.

    Raises:
      SpecmdError: an unknown name.
    """
    names = given.split(",") if isinstance(given, str) else list(given or ())
    found = {find("kind to strip", name, (*STRIPPABLE, "all")) for name in names if name.strip()}
    return frozenset(STRIPPABLE) if "all" in found else frozenset(found)


def examined(trace: Trace, place: str, strip: Collection[str] = (), known: Known = FULL) -> Trace:
    """Gives a valid trace of what a reader found, with a warning for each thing that is not as it should be.

    Args:
      trace: as it was read, not validated; K may have the column of a shared expert.
      strip: kinds of `STRIPPABLE` to take out.
    Raises:
      SpecmdError: a kind that is refused, or what `validate` refuses.
    """
    if trace.expert_ids.size == 0 or trace.top_k < 1:
        validate(trace, place)
    notes: list[str] = []
    trace = _whole_ids(trace, place, notes)
    trace = _without_shared(trace, place, strip, notes)
    trace = _without_dense(trace, place, notes)
    trace = _taken_out(trace, place, strip, known, notes)
    notes += _of_file(trace, known)
    if notes:
        trace = dataclasses.replace(trace, meta=trace.meta | {"warnings": [*trace.meta.get("warnings", ()), *notes]})
    validate(trace, place)
    return trace


# ------------------------------------------------------------------------------------------------------------- ids


def _whole_ids(trace: Trace, place: str, notes: list[str]) -> Trace:
    """Gives -1 where it became unsigned; refuses ids that were read as int8."""
    ids = trace.expert_ids
    none = np.zeros(ids.shape[:2], np.bool_)
    for value in _UNSIGNED:
        alone = trace.top_k > 1 or value >= trace.experts
        none |= alone & (ids == value).all(-1)
    single = (ids >= trace.experts) & np.isin(ids, _UNSIGNED)
    if none.any() or single.any():
        ids = np.where(none[..., None] | single, -1, ids)
        cells = int((none | single.any(-1)).sum())
        notes.append(f"{cells} of {none.size} cells: 255 or 65535 where no expert ran, which is -1 without its sign")
        trace = dataclasses.replace(trace, expert_ids=ids)
    wrapped = ids < -1
    if wrapped.any():
        token, layer, slot = (int(i) for i in np.argwhere(wrapped)[0])
        value = ids[token, layer, slot]
        reason = "an id above 127 that was read as int8" if value >= -128 else "no expert"
        raise SpecmdError(
            f"{_where(trace, token, place)}, layer {layer}: expert id is {value}, {reason}; expected 0 to "
            f"{trace.experts - 1}, or -1"
        )
    return trace


def _without_shared(trace: Trace, place: str, strip: Collection[str], notes: list[str]) -> Trace:
    ids, count = trace.expert_ids, 0
    used = ids >= 0
    while count < trace.top_k - 1:
        column = trace.top_k - 1 - count
        here = ids[..., column][used[..., column]]
        if not here.size or (here < trace.experts).any():
            break
        count += 1
    if count:
        first = trace.top_k - count
        named = int(ids[..., first].max())
        if "shared" not in strip:
            raise SpecmdError(
                f"{place}: column {first + 1} of {trace.top_k} is expert {named} of {trace.experts} in every row: a "
                "fused shared expert, which no router chose; expected routed experts (strip 'shared' takes it out)"
            )
        notes.append(f"a fused shared expert (id {named}, column {first + 1}) was taken out: it counts as dense")
        cut = None if trace.gates is None else trace.gates[..., :first]
        meta = trace.meta | {"shared_experts": count}
        return dataclasses.replace(trace, expert_ids=ids[..., :first], gates=cut, meta=meta)
    last = ids[..., -1][used[..., -1]]
    if trace.top_k > 1 and last.size >= 16 and (last == trace.experts - 1).all():
        notes.append(
            f"the last column is expert {trace.experts - 1} in every row: if that is a fused shared expert, say "
            f"experts {trace.experts - 1}"
        )
    return trace


def _without_dense(trace: Trace, place: str, notes: list[str]) -> Trace:
    """Leaves out layers and columns that no token uses."""
    ids = trace.expert_ids
    empty = (ids < 0).all(-1)
    zeros = (ids == 0).all(-1) if trace.top_k > 1 else np.zeros_like(empty)
    if empty.all():
        raise SpecmdError(f"{place}: every expert id is -1, expected some routing")
    if (empty | zeros).all():
        raise SpecmdError(f"{place}: every expert id is 0: the engine recorded nothing, expected some routing")
    dense = empty.all(0) | (empty | zeros).all(0)
    slots = (ids[:, ~dense] >= 0).any(axis=(0, 1))
    if not dense.any() and slots.all():
        return trace
    numbers = np.asarray(trace.meta.get("layer_numbers", range(trace.layers)))
    kept = np.flatnonzero(~dense)
    meta = dict(trace.meta)
    if dense.any():
        notes.append(f"{_layers(numbers[dense])} without routed experts, taken for dense and left out")
        meta["layer_numbers"] = numbers[kept].tolist()
    wide = {name: getattr(trace, name) for name in ("logits", "ahead")}
    return dataclasses.replace(
        trace,
        expert_ids=ids[:, kept][:, :, slots],
        gates=None if trace.gates is None else trace.gates[:, kept][:, :, slots],
        expert_bytes=trace.expert_bytes[kept],
        meta=meta,
        **{name: None if array is None else array[:, kept] for name, array in wide.items()},
    )


# ---------------------------------------------------------------------------------------------------------- tokens


def _taken_out(trace: Trace, place: str, strip: Collection[str], known: Known, notes: list[str]) -> Trace:
    """Refuses, names or takes out tokens, kind by kind."""
    k, gone = trace.top_k, np.zeros(trace.tokens, np.bool_)
    padding, nan, ranking = suspects.padding(trace), suspects.nan(trace), suspects.ranking(trace)
    alike = suspects.alike(trace) & ~padding & ~nan
    profiling = suspects.leading(alike)
    repeats = suspects.runs(alike & suspects.decoded(trace) & ~profiling)
    rejected = np.zeros(trace.tokens, np.bool_) if known.rejected is None else known.rejected
    for kind, refused, mask, named, what in (
        ("padding", True, padding, padding, f"the same expert {k} times in every layer: padding, no routing"),
        ("ranking", True, ranking, ranking, "a prompt of one token's whole ranking, read past a strided view"),
        ("nan", False, nan, nan, f"experts 0 to {k - 1} in all layers, as of a router that saw NaN"),
        (
            "profiling",
            False,
            profiling,
            profiling,
            "alike in front of everything, as of an engine that measures itself",
        ),
        (
            "repeats",
            False,
            repeats,
            suspects.with_first(repeats) & ~profiling,
            "decoded with the experts of their neighbours in all layers, as of a captured graph that returns one row",
        ),
        ("drafts", False, rejected, rejected, "of drafts that were rejected (meta key 'rejected' has them)"),
    ):
        if not mask.any():
            continue
        many = f"{int(named.sum())} of {trace.tokens} tokens"
        if kind in strip:
            gone |= mask
            notes.append(f"{many}: {what}; taken out")
        elif refused:
            raise SpecmdError(
                f"{_where(trace, int(mask.argmax()), place)}: {what} ({many}); expected routing (strip {kind!r} takes "
                "them out)"
            )
        else:
            notes.append(f"{many}: {what}; strip {kind!r} takes them out")
    if gone.all():
        raise SpecmdError(f"{place}: nothing is left without what was to be taken out, expected some routing")
    left = without_tokens(trace, gone) if gone.any() else trace
    still = rejected & ~gone
    meta = dict(left.meta)
    if still.any() or not (gone == rejected).all():
        meta.pop("accepted", None)  # counts of passes that are no more, or hold more than was kept
    if still.any():
        ends = np.cumsum(left.lengths)[:-1]
        meta["rejected"] = [np.flatnonzero(part).tolist() for part in np.split(still[~gone], ends)]
    return dataclasses.replace(left, meta=meta)


def without_tokens(trace: Trace, gone: Mask) -> Trace:
    """Gives a trace without some tokens [N]; requests that lose all of them go, too."""
    request = np.repeat(np.arange(trace.requests), trace.lengths)
    prompt = ~suspects.decoded(trace)
    lengths = np.bincount(request[~gone], minlength=trace.requests).astype(np.int32)
    prompts = np.bincount(request[~gone & prompt], minlength=trace.requests).astype(np.int32)
    kept = np.flatnonzero(lengths)
    meta: dict[str, Any] = dict(trace.meta)
    for key in ("requests", "accepted"):
        if isinstance(meta.get(key), list):
            meta[key] = [meta[key][index] for index in kept]
    arrays = {name: getattr(trace, name) for name in ("gates", "logits", "ahead")}
    return dataclasses.replace(
        trace,
        expert_ids=trace.expert_ids[~gone],
        lengths=lengths[kept],
        prompt_lengths=prompts[kept],
        meta=meta,
        **{name: None if array is None else array[~gone] for name, array in arrays.items()},
    )


# ---------------------------------------------------------------------------------------------------------- words


def _of_file(trace: Trace, known: Known) -> list[str]:
    notes = list(known.notes)
    if not known.phases:
        notes.append("prompt tokens are not told from decoded ones: all count as decoded")
    elif not trace.prompt_lengths.any():
        notes.append("no prompt tokens: prefill is not in the file, and replays begin with decoding")
    if not known.token_breaks:
        notes.append("where a token ends is not in the file: it was concluded from the layers")
    if known.interleaved:
        notes.append("requests alternate in the file: they were put one after another (batch replays them together)")
    return notes


def _layers(numbers: Collection[int]) -> str:
    few = ", ".join(str(number) for number in list(numbers)[:8])
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"layer{'s' * (len(numbers) > 1)} {few}{more}"


def _where(trace: Trace, token: int, place: str) -> str:
    ends = np.cumsum(trace.lengths, dtype=np.int64)
    request = int(np.searchsorted(ends, token, side="right"))
    if request >= trace.requests:  # lengths do not fit: `validate` says so
        return f"{place}: token {token}"
    return f"{place}: request {request}, token {token - int(ends[request] - trace.lengths[request])}"
