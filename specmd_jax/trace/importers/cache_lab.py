"""``moe-cache-lab``: its routing JSON Lines, versions 1 and 2.

The first line is ``metadata`` (``format_version``, ``model_id``, maybe ``num_experts``); every other is a
``routing_selection`` with ``phase``, ``token_position``, ``layer``, ``selected_experts`` and maybe
``selected_probabilities``, which are taken for gates where every line has them. One file is one request.

Version 2 has the stages of an encoder-decoder model, with experts of their own: the decoder is read, and the encoder
left out and named, unless it is alone; then it is prompt throughout. Where ``assignment_state`` is ``unassigned`` no
expert ran: -1. See `token_rows` for what becomes of the lines.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, read_records, whole_number
from specmd_jax.trace.importers.joining import UNSAID, Sizes
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.token_rows import Names, Row, row_of, trace_of_rows
from specmd_jax.types import Trace

_FORMAT = "moe-cache-lab.routing-jsonl"
_NAMES = Names("token_position", "layer", "selected_experts", phase="phase", gates="selected_probabilities")
_PHASES = {"decoder_prompt": "prompt", "source": "prompt", "decoder_generated": "generated"}

Records = list[tuple[str, dict[str, Any]]]


def is_cache_lab(peek: Peek) -> bool:
    return bool(peek.first_lines) and _FORMAT in peek.first_lines[0]


def import_cache_lab(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads moe-cache-lab's lines; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    (place, head), *events = read_records(path)
    version = head.get("format_version")
    if head.get("record_type") != "metadata" or head.get("format") != _FORMAT or version not in (1, 2):
        raise SpecmdError(f"{place}: {brief(head)}, expected the metadata of {_FORMAT}, format_version 1 or 2")
    name = head.get("model_id") if isinstance(head.get("model_id"), str) else None
    experts, notes = head.get("num_experts"), ()
    if version == 2:
        stage, experts = _stage(place, head)
        mine = [(where, event) for where, event in events if event.get("routing_stage") == stage]
        if len(mine) < len(events):
            notes = (f"{len(events) - len(mine)} selections of the encoder are left out: its experts are others",)
        events = mine
    if experts is not None and (type(experts) is not int or not 1 <= experts < 1 << 31):
        raise SpecmdError(f"{place}: num_experts is {brief(experts)}, expected an integer >= 1")
    known = Known(notes=notes)
    return trace_of_rows(
        path, _rows(events), sizes, f"moe-cache-lab v{version}", strip, name=name, experts=experts, known=known
    )


def _stage(place: str, head: dict[str, Any]) -> tuple[str, Any]:
    """Gives the stage that is read, and its experts."""
    profiles = head.get("routing_stages")
    found = (
        {one.get("routing_stage"): one for one in profiles if isinstance(one, dict)}
        if isinstance(profiles, list)
        else {}
    )
    for stage in ("decoder", "encoder"):
        if stage in found:
            return stage, found[stage].get("num_experts")
    raise SpecmdError(f"{place}: routing_stages is {brief(profiles)}, expected encoder, decoder or both")


def _rows(events: Records) -> Iterator[Row]:
    for place, event in events:
        if event.get("record_type") != "routing_selection":
            raise SpecmdError(f"{place}: record_type is {brief(event.get('record_type'))}, expected routing_selection")
        plain = event | {"phase": _PHASES.get(str(event.get("phase")), event.get("phase"))}
        if event.get("assignment_state") == "unassigned":
            token, layer = whole_number(event, "token_position", place), whole_number(event, "layer", place)
            yield Row(place, 0, plain["phase"] == "prompt", token, layer, [])
        else:
            yield row_of(place, plain, _NAMES)._replace(request=0)
