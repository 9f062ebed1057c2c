"""The rows of `experiments.list`: each thing that has a name, with its numbers and what is known of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from specmd_jax.engines.table import ENGINES
from specmd_jax.policies.choice import AXES
from specmd_jax.specs import engines
from specmd_jax.specs.hardware import HARDWARE, HARDWARE_NOTES
from specmd_jax.specs.machine import items_of
from specmd_jax.specs.models import MODELS
from specmd_jax.trace.bundled import BUNDLED, load_named
from specmd_jax.trace.importers.table import IMPORTERS

Rows = list[dict[str, Any]]


def listed(kind: str) -> Rows:
    """Gives a row for each name of a kind (`experiments.list.KINDS`)."""
    return LISTS[kind]() if kind in LISTS else policies(kind)


def models() -> Rows:
    """Gives shapes, and bytes and bits of an expert."""
    return [
        {
            "name": name,
            "layers": spec.layers,
            "experts": spec.experts,
            "top_k": spec.top_k,
            "expert_bytes": spec.expert_bytes,
            "expert_bits": spec.weights_bits,
            "notes": spec.notes or None,
            "source": spec.source,
        }
        for name, spec in MODELS.items()
    ]


def hardware() -> Rows:
    """Gives every number of each machine, and how it is known."""
    return [
        {
            "name": name,
            **dict(items_of(machine)),
            "evidence": " ".join(f"{number}={how}" for number, how in HARDWARE_NOTES[name].evidence.items()),
            "source": HARDWARE_NOTES[name].source,
        }
        for name, machine in HARDWARE.items()
    ]


def traces() -> Rows:
    """Gives what the traces that come with the package hold."""
    found = []
    for name in BUNDLED:
        trace, _ = load_named(name, None)
        meta = trace.meta
        shape = {"layers": trace.layers, "experts": trace.experts, "top_k": trace.top_k}
        told = {key: meta.get(key) for key in ("licence", "source", "capture")}
        counts = {"requests": trace.requests, "tokens": trace.tokens}
        found.append({"name": name, "model": trace.model, **counts, **shape, **told})
    return found


def policies(axis: str) -> Rows:
    """Gives the policies of an axis: what each does, and its numbers with their defaults."""
    return [
        {"name": name, "numbers": _numbers(factory), "about": _about(factory)}
        for name, factory in AXES[axis].table.items()
    ]


def importers() -> Rows:
    """Gives the formats of traces that can be read."""
    return [{"name": name, "about": importer.about} for name, importer in IMPORTERS.items()]


def own_engines() -> Rows:
    """Gives what replays, and why not here."""
    return [{"name": name, "here": engine.here() or "yes", "about": engine.about} for name, engine in ENGINES.items()]


def engines_of_others() -> Rows:
    """Gives the engines that may stand behind a machine; their numbers are estimated, by a fit."""
    return [
        {"name": name, "layer_s": one.layer_s, "link_share": one.link_share, "source": one.source}
        for name, one in engines.ENGINES.items()
    ]


LISTS: Mapping[str, Callable[[], Rows]] = {
    "models": models,
    "hardware": hardware,
    "traces": traces,
    "importers": importers,
    "engines": own_engines,
    "engines_of_others": engines_of_others,
}


def _about(factory: Callable[..., Any] | None) -> str:
    if factory is None:
        return "nothing"
    function = getattr(factory, "func", factory)
    bound = ", ".join(map(repr, getattr(factory, "args", ())))
    first = (inspect.getdoc(function) or "").split("\n\n")[0]
    return " ".join(first.split()) + (f" [{bound}]" if bound else "")


def _numbers(factory: Callable[..., Any] | None) -> str | None:
    if factory is None:
        return None
    given = inspect.signature(factory).parameters.values()
    found = [f"{one.name}={one.default}" for one in given if one.default is not inspect.Parameter.empty]
    return " ".join(found) or None
