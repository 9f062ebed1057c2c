"""What is asked: a model, a machine and its memory, checked, with the routing to replay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.options import size
from configs.recommend import BUNDLED_OF, TRIED, RecommendConfig
from experiments.recommending.seen import what_was_seen
from specmd_jax.errors import SpecmdError
from specmd_jax.specs.hardware import Hardware
from specmd_jax.specs.memory import share_memory
from specmd_jax.specs.models import ModelSpec
from specmd_jax.specs.models import model as find_model
from specmd_jax.specs.record import META_KEY, to_record
from specmd_jax.trace import first_tokens, synthesize
from specmd_jax.trace.bundled import load_named
from specmd_jax.trace.filling import with_filling
from specmd_jax.trace.locality import locality_of
from specmd_jax.trace.prompts import PROMPT_NOTE, clip_requests, longest_requests, with_prompts
from specmd_jax.trace.select import select_requests
from specmd_jax.types import Trace
from specmd_jax.units import GIB

CONTEXT = 4096
"""Tokens of context where none are given."""


@dataclass(frozen=True)
class Routing:
    """What is replayed."""

    trace: Trace  # requests that ask for every expert once, those that warm up, and those that are counted
    warmup_tokens: int  # of `trace`: those that are not counted
    cold: Trace  # the same with the counted ones first: they begin with an empty cache
    source: str  # in words
    synthetic: bool
    sha256: str | None  # of the trace file
    seen: tuple[str, ...] = ()  # what trained policies have learned of the requests, a sentence each

    @property
    def evidence(self) -> str:
        """What every number rests on."""
        kind = "estimated from" if self.synthetic else "simulated on"
        made = f", {PROMPT_NOTE}" if "prompts" in self.trace.meta else ""
        return f"{kind} {self.source}{made}"


@dataclass(frozen=True)
class Question:
    """A checked `RecommendConfig`."""

    config: RecommendConfig
    spec: ModelSpec  # as it is stored
    machine: Hardware
    routing: Routing
    memory_bytes: int
    parts: dict[str, int]  # what of the memory is not for cached experts
    assumed: dict[str, str]  # parts whose bytes are assumed -> what is
    context: int  # tokens
    host: dict[str, Any] = field(
        default_factory=dict
    )  # fields of `Setting` where host memory does not hold all experts

    @property
    def fixed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def all_expert_bytes(self) -> int:
        return self.spec.all_expert_bytes

    @property
    def budget_bytes(self) -> int:
        """What is left for the cache; more than all experts is all of them."""
        return min(self.memory_bytes - self.fixed_bytes, self.all_expert_bytes)

    @property
    def prefetches(self) -> tuple[str, ...]:
        """The predictors to try: those that are asked for, else those that the trace serves."""
        if self.config.prefetches:
            return self.config.prefetches
        return tuple(name for name in TRIED if name != "gate_ahead" or self.routing.trace.ahead is not None)

    @property
    def stored(self) -> dict[str, object]:
        """What the report must know besides the settings."""
        return {
            "trace": self.routing.source,
            "capacity_bytes": self.budget_bytes,
            "memory_bytes": self.memory_bytes,
            "parts": self.parts,
            "assumed": self.assumed,
            "context": self.context,
            "shape": [self.spec.layers, self.spec.experts, self.spec.top_k],
            "expert_bytes": self.spec.expert_bytes,
            "weight_bits": self.spec.weights_bits,
            "link_bytes_per_s": float(self.machine.link_bytes_per_s),
            "host_bytes": self.host.get("host_capacity"),
            **({"seen": list(self.routing.seen)} if self.routing.seen else {}),
        }


def ask(config: RecommendConfig) -> Question:
    """Raises SpecmdError if the trace is not the model's, or the memory holds not a single expert."""
    spec, machine, memory = find_model(config.model), config.whole_machine(), size(config.memory)
    context = config.context if config.context is not None else CONTEXT if spec.attention else 0
    share = share_memory(spec, memory, bits=config.bits, context=context, batch=config.batch)
    spec = share.spec
    demanded = min(spec.experts, config.batch * (1 + config.drafts) * spec.top_k)
    parts = {part.name: part.bytes for part in share.parts}
    parts[f"one visit's {demanded} experts"] = demanded * spec.expert_bytes
    needed = sum(parts.values()) + spec.expert_bytes
    if memory < needed:
        listed = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        raise SpecmdError(
            f"memory {config.memory} is {memory / GIB:.2f} GiB, {spec.name} takes {listed} GiB before any expert is "
            f"cached: expected at least {needed / GIB:.2f} GiB"
        )
    assumed = {part.name: part.assumed for part in share.assumed if part.bytes}
    host = _host(config, spec, min(memory - sum(parts.values()), spec.all_expert_bytes))
    return Question(config, spec, machine, _routing(config, spec), memory, parts, assumed, context, host)


def _host(config: RecommendConfig, spec: ModelSpec, cached_bytes: int) -> dict[str, Any]:
    """Gives the fields of `Setting` for host memory; none where it holds all experts. Raises SpecmdError if it is less
    than the cache, of whose experts it keeps a copy, or nothing is known of the storage behind it.
    """
    if config.ram is None or size(config.ram) >= spec.all_expert_bytes or cached_bytes >= spec.all_expert_bytes:
        return {}
    held, every = size(config.ram), spec.all_expert_bytes / GIB
    if config.ssd is None:
        raise SpecmdError(
            f"ram {config.ram} holds {held / GIB:.2f} of {every:.2f} GiB of experts: expected --ssd, the storage that "
            "has the rest, such as nvme-4"
        )
    if held < cached_bytes:
        raise SpecmdError(
            f"ram {config.ram} is {held / GIB:.2f} GiB, less than the {cached_bytes / GIB:.2f} GiB of experts that the "
            "accelerator caches and host memory keeps a copy of: expected at least that"
        )
    return {"host_capacity": held, "storage": config.ssd}


def _routing(config: RecommendConfig, spec: ModelSpec) -> Routing:
    """Gives the routing in the model's own shape and sizes, whatever a trace says of its sizes."""
    requests = config.batch * (config.warmup_requests + config.requests)
    passes = round(config.visits / spec.layers / (config.warmup_requests + config.requests)) - 1
    decoded = min(max(passes, config.least_decoded), config.most_decoded)
    found = _recorded(config, spec, requests, config.prompt_tokens + decoded)
    trace, source, sha256 = found or _made(config, spec, requests, decoded)
    seen = () if found is None else what_was_seen(trace, config.evictions, config.prefetches)
    meta = {"model": spec.name, META_KEY: to_record(spec)} | {k: v for k, v in trace.meta.items() if k == "prompts"}
    sizes = np.full(spec.layers, spec.expert_bytes, np.int64)
    trace = replace(trace, expert_bytes=sizes, logits=None, meta=meta)
    warm = config.batch * config.warmup_requests
    counted_from = int(trace.lengths[:warm].sum())
    if trace.requests <= warm:  # too few requests, perhaps a long one: the second half of the tokens is counted
        warm, counted_from = 0, trace.tokens // 2
    filled, front = with_filling(trace, config.batch, counted_from)
    cold = select_requests(filled, np.roll(np.arange(filled.requests), -config.batch - warm))
    return Routing(filled, front + counted_from, cold, source, found is None, sha256, seen)


def _recorded(config: RecommendConfig, spec: ModelSpec, requests: int, tokens: int) -> tuple[Trace, str, str] | None:
    """Gives the trace that is asked for, or a bundled one of the model's shape; None: there is none."""
    name = config.trace or BUNDLED_OF.get(spec.name)
    if name is None:
        return None
    trace, sha256 = load_named(name)
    shape, own = (trace.layers, trace.experts, trace.top_k), (spec.layers, spec.experts, spec.top_k)
    if shape != own:
        if config.trace is None:
            return None
        raise SpecmdError(
            f"trace {name} has {shape[0]} layers and routes top-{shape[2]} of {shape[1]} experts, "
            f"expected {spec.name}'s {own[0]} layers and top-{own[2]} of {own[1]}"
        )
    if trace.requests < config.batch:
        raise SpecmdError(
            f"trace {name} has {trace.requests} requests, expected at least the {config.batch} of a batch"
        )
    if trace.requests > 1:
        trace = clip_requests(longest_requests(trace, requests), tokens)
    else:
        trace = first_tokens(trace, int(trace.prompt_lengths[0]) + max(4, round(config.visits / spec.layers)))
    if not trace.prompt_lengths.any():
        trace = with_prompts(trace, config.prompt_tokens)
    if "gate_ahead" in config.prefetches and trace.ahead is None:
        raise SpecmdError(f"prefetch 'gate_ahead' needs a trace with `ahead` scores, and {name} has none")
    return trace, f"recorded routing {Path(name).name}", sha256


def _made(config: RecommendConfig, spec: ModelSpec, requests: int, decoded: int) -> tuple[Trace, str, None]:
    """Makes up routing with the model's own locality."""
    knobs, like = locality_of(spec.name, spec.experts, spec.top_k)
    trace = synthesize(
        layers=spec.layers,
        experts=spec.experts,
        top_k=spec.top_k,
        tokens=config.prompt_tokens + decoded,
        requests=requests,
        prompt_tokens=config.prompt_tokens,
        with_ahead=True,
        seed=config.seed,
        **knobs._asdict(),
    )
    whose = "this model's measured locality" if like is None else f"the locality of {like}, which is assumed"
    unlike = ""
    if spec.name in BUNDLED_OF:
        unlike = " (the bundled recording routes otherwise than the model)"
    return trace, f"synthetic routing with {whose}{unlike}", None
