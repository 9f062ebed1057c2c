"""Records the routing of a running `transformers` model (torch) with forward hooks on its routers.

    with capture(model) as recorder:
        model.generate(**inputs)          # one sequence at a time, as often as you like
    save_trace(recorder.trace(), "mine.npz")

A layer's router ("gate") is found by structure: the module beside ``experts`` whose own ``weight`` has one row per
expert. In transformers 5 it returns (logits [T, E], gates [T, K], expert ids [T, K]), also in families that drop
``output_router_logits``. Every call of the hooked model is a pass: one that starts an empty context, or that brings
several tokens after a decode step, starts a request with its prompt; further passes of several tokens go on with the
prompt, passes of one token decode. The last token that is generated is never run, so G generated tokens are G - 1
decode tokens of the trace. What is recorded stays on the model's device until its request ends: no step waits for it.

torch is imported by the caller; nothing here needs it to be installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.validate import validate
from specmd_jax.types import Trace

Module = Any  # torch.nn.Module, which the type checker may not have
Tensor = Any  # torch.Tensor

CACHE_NAMES = ("cache", "past_key_values")
"""What a model's call names its keys and values; transformers 5.24 renamed them."""


class Gate(NamedTuple):
    """A router of a model."""

    name: str  # dotted name in the model
    module: Module
    experts: int  # E
    expert_bytes: int  # of one expert as the model holds it; 0: not to be seen


class Places(NamedTuple):
    """Which members of a gate's output are the ids, the shares and the scores."""

    parts: int  # members of the output
    ids: int
    gates: int
    logits: int
    top_k: int


class Routed(NamedTuple):
    """What a gate gave in one pass of T tokens."""

    ids: Any  # [T, K]
    gates: Any  # [T, K]
    logits: Any  # [T, E] or None


@dataclasses.dataclass
class _Request:
    prompt: int = 0
    length: int = 0
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    passes: list[list[Routed]] = dataclasses.field(default_factory=list)  # [pass][layer]
    tokens: list[Any] = dataclasses.field(default_factory=list)
    arrays: tuple[npt.NDArray[Any], ...] = ()  # ids, gates and perhaps logits [T, L, ...] once the request has ended


@contextlib.contextmanager
def capture(
    model: Module,
    *,
    logits: bool = False,
    token_ids: bool = False,
    name: str | None = None,
    expert_bytes: int | None = None,
) -> Iterator[Recorder]:
    """Hooks the routers of a `transformers` model while the context lasts, and gives the `Recorder`.

    Args:
      model: the module that is called (and whose ``generate`` is called), a causal language model.
      logits: record the routers' first output [T, E] too, the logits in most families (E / K times the memory).
      token_ids: record the tokens that went in, as ``token_ids`` in the meta row of each request.
      name: the model's name in the trace; default: the folder or repository it was loaded from, or its model type.
      expert_bytes: bytes of one expert; default: what the parameters of ``experts`` take in this model.
    Raises:
      SpecmdError: no router is found, or one that is not understood; while the model runs: more than one sequence at
        once, a cache that was cut (speculative decoding), a router that did not run or gave something else.
    """
    gates = find_gates(model)
    if expert_bytes is not None and expert_bytes < 1:
        raise SpecmdError(f"expert_bytes is {expert_bytes}, expected at least 1")
    for gate in gates:
        if not (expert_bytes or gate.expert_bytes):
            raise SpecmdError(f"{gate.name}: its experts hold no parameters that torch shows, expected expert_bytes")
    recorder = Recorder(model, gates, logits, token_ids, name, expert_bytes)
    handles = [
        model.register_forward_pre_hook(recorder._begin_pass, with_kwargs=True),
        model.register_forward_hook(recorder._end_pass),
    ]
    try:
        for index, gate in enumerate(gates):
            handles.append(gate.module.register_forward_hook(recorder._gate_hook(index)))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """What `capture` has seen so far."""

    def __init__(
        self,
        model: Module,
        gates: list[Gate],
        logits: bool,
        token_ids: bool,
        name: str | None,
        expert_bytes: int | None,
    ):
        self.gates = gates
        self._with_logits, self._with_tokens = logits, token_ids
        self._expert_bytes = [expert_bytes or gate.expert_bytes for gate in gates]
        self._meta = _describe(model, gates, name, expert_bytes)
        self._requests: list[_Request] = []
        self._labels: dict[str, Any] = {}
        self._pass: dict[int, Routed] | None = None  # layer -> what its gate gave
        self._pass_tokens = 0
        self._pass_input: Any = None

    @property
    def requests(self) -> int:
        """Requests seen so far."""
        return len(self._requests)

    def label(self, **row: Any) -> None:
        """Adds to the meta row of the next request (values that JSON can hold), such as ``prompt_id=3``."""
        self._labels |= row

    def trace(self) -> Trace:
        """Gives everything recorded so far.

        Raises:
          SpecmdError: nothing was recorded, or the arrays are no valid trace (a gate that is not finite).
        """
        self._close_request()
        if not self._requests:
            raise SpecmdError("nothing was captured: call the model inside of the context")
        columns = [np.concatenate(column) for column in zip(*(r.arrays for r in self._requests), strict=True)]
        ids, gates = columns[:2]
        order = np.argsort(-gates, axis=-1, kind="stable")  # not every family's router sorts
        trace = Trace(
            expert_ids=np.take_along_axis(ids, order, -1),
            lengths=np.array([r.length for r in self._requests], np.int32),
            prompt_lengths=np.array([r.prompt for r in self._requests], np.int32),
            experts=self.gates[0].experts,
            expert_bytes=np.array(self._expert_bytes, np.int64),
            gates=np.take_along_axis(gates, order, -1),
            logits=columns[2] if self._with_logits else None,
            meta=self._meta | {"requests": [{"prompt_tokens": r.prompt} | r.row for r in self._requests]},
        )
        validate(trace, "captured trace")
        return trace

    # ------------------------------------------------------------------------------------------------- hooks

    def _begin_pass(self, _module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = _input_of(args, kwargs)
        batch, length = tokens.shape[:2]
        if batch != 1:
            raise SpecmdError(f"a batch of {batch} sequences, expected 1: capture one prompt at a time")
        caches = [kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None]
        past = int(caches[0].get_seq_length()) if caches else 0
        last = self._requests[-1] if self._requests else None
        if past == 0:
            if kwargs.get("use_cache") is False and last is not None and last.length + 1 == length > 1:
                raise SpecmdError("a prompt that grows by one token: generate with use_cache=True, as each pass counts")
            self._open_request()
        elif last is None:
            raise SpecmdError(f"the first pass goes on after {past} cached tokens, expected the start of a request")
        elif past != (seen := self._context()):
            raise SpecmdError(
                f"request {len(self._requests) - 1}: {past} cached tokens after {seen} were seen, expected {seen} "
                "(speculative decoding and reused prompts cannot be captured)"
            )
        elif length > 1 and last.length > last.prompt:
            self._open_request(past)  # a further turn of the same context
        self._pass, self._pass_tokens = {}, length
        self._pass_input = tokens if tokens.ndim == 2 else None

    def _gate_hook(self, index: int) -> Any:
        gate = self.gates[index]
        places: Places | None = None  # looked for once: a hook should cost little

        def hook(_module: Module, _args: Any, output: Any) -> None:
            nonlocal places
            if self._pass is None:
                raise SpecmdError(f"{gate.name} ran outside of a pass: give capture the module that is called")
            if index in self._pass:
                raise SpecmdError(f"{gate.name} ran twice in a pass, expected once")
            tokens = self._pass_tokens
            known = places is not None and isinstance(output, tuple) and len(output) == places.parts
            if places is None or not known or output[places.ids].shape != (tokens, places.top_k):
                places = _places(gate, output, tokens)
            self._pass[index] = _copied(output, places, self._with_logits)

        return hook

    def _end_pass(self, _module: Module, _args: Any, _output: Any) -> None:
        seen, self._pass = self._pass, None
        assert seen is not None
        for index, gate in enumerate(self.gates):
            if index not in seen:
                raise SpecmdError(f"{gate.name} did not run in a pass: a fused kernel may stand in for its layer")
        request = self._requests[-1]
        if self._pass_tokens > 1 or request.length == 0:
            request.prompt += self._pass_tokens
        request.length += self._pass_tokens
        request.passes.append([seen[index] for index in range(len(self.gates))])
        if self._with_tokens:
            if self._pass_input is None:
                raise SpecmdError("the model was called without input_ids: token_ids cannot be recorded")
            request.tokens.append(self._pass_input[0].detach().clone())

    # ---------------------------------------------------------------------------------------------- requests

    def _context(self) -> int:
        """Gives the tokens in the context that the last request is part of."""
        request = self._requests[-1]
        return request.row.get("context_start", 0) + request.length

    def _open_request(self, past: int = 0) -> None:
        self._close_request()
        row, self._labels = self._labels, {}
        self._requests.append(_Request(row=row | ({"context_start": past} if past else {})))

    def _close_request(self) -> None:
        """Fetches what the last request left on the device; one that saw no whole pass is dropped."""
        if not self._requests:
            return
        request = self._requests[-1]
        if not request.length:
            self._requests.pop()
            return
        if not request.passes:
            return
        fields = ("ids", "gates", "logits")[: 3 if self._with_logits else 2]
        passes = request.passes
        fresh = tuple(
            np.concatenate([np.stack([_numpy(getattr(routed, field)) for routed in layers], 1) for layers in passes])
            for field in fields
        )
        before = request.arrays
        request.arrays = tuple(map(np.concatenate, zip(before, fresh, strict=True))) if before else fresh
        request.passes = []
        if self._with_tokens:
            fed = [int(token) for tokens in request.tokens for token in tokens.tolist()]
            request.row["token_ids"] = request.row.get("token_ids", []) + fed
            request.tokens = []


def find_gates(model: Module) -> list[Gate]:
    """Gives the routers of a model in the order of its layers.

    Raises:
      SpecmdError: it is no torch module or has no router, a block of experts has none that can be told, or the layers
        have different numbers of experts.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise SpecmdError(f"a {type(model).__name__} to capture, expected a torch module (a transformers model)")
    gates, ignored = [], []
    for path, block in model.named_modules():
        children = dict(block.named_children())
        experts = children.pop("experts", None)
        if experts is None:
            continue
        count = _expert_count(experts)
        matches = [key for key, child in children.items() if count and _rows(child) == count]
        if len(matches) == 1:
            gates.append(Gate(f"{path}.{matches[0]}", children[matches[0]], count, _expert_bytes(experts, count)))
        else:
            ignored.append((f"{path}.experts", count, matches))
    for place, count, matches in ignored[:1]:
        found = f"found {' and '.join(matches)}" if matches else "found none"
        raise SpecmdError(f"{place}: expected one router with a weight of {count} rows beside it, {found}")
    if not gates:
        raise SpecmdError(
            f"{type(model).__name__} has no router: expected blocks that hold 'experts', as transformers 5 builds them"
        )
    for gate in gates:
        if gate.experts != gates[0].experts:
            raise SpecmdError(f"{gate.name} has {gate.experts} experts, expected {gates[0].experts} in all layers")
    return gates


def _expert_count(experts: Module) -> int:
    """E, or 0 if it cannot be told: stacked matrices share their first axis, a list has one module per expert."""
    stacked = {p.shape[0] for p in experts.parameters(recurse=False) if p.ndim == 3}
    if len(stacked) == 1:
        return int(stacked.pop())
    count = getattr(experts, "num_experts", None)
    return count if isinstance(count, int) else sum(1 for _ in experts.children())


def _rows(child: Module) -> int:
    """Rows of a module's own weight matrix; 0: it has none. A shared expert keeps its matrices deeper down."""
    weight = dict(child.named_parameters(recurse=False)).get("weight")
    return int(weight.shape[0]) if weight is not None and weight.ndim == 2 else 0


def _expert_bytes(experts: Module, count: int) -> int:
    held = [*experts.parameters(), *experts.buffers()]
    return -(-sum(t.numel() * t.element_size() for t in held) // count)


def _describe(model: Module, gates: list[Gate], name: str | None, expert_bytes: int | None) -> dict[str, Any]:
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", None) or "unknown")
    loaded = Path(str(getattr(config, "_name_or_path", None) or "")).name
    versions = " and ".join(f"{package} {_version(package)}" for package in ("transformers", "torch"))
    size = "as given" if expert_bytes else "those of the experts' parameters in memory"
    meta: dict[str, Any] = {
        "model": name or loaded or model_type,
        "model_type": model_type,
        "source": f"specmd_jax.trace.capture of {type(model).__name__}",
        "licence": "unknown",
        "capture": f"forward hooks on the routers, {versions}; gates as the experts' outputs are weighted with; "
        f"expert_bytes: {size}; the last generated token is not run",
    }
    numbers = [re.findall(r"\.(\d+)\.", gate.name) for gate in gates]
    if all(len(number) == 1 for number in numbers):
        layers = [int(number[0]) for number in numbers]
        if layers != list(range(len(gates))):  # some layers are dense
            meta["layer_numbers"] = layers
    return meta


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(unknown)"


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """input_ids [B, T] or inputs_embeds [B, T, D] of a call."""
    for value in (kwargs.get("input_ids"), args[0] if args else None, kwargs.get("inputs_embeds")):
        if getattr(value, "ndim", 0) in (2, 3):
            return value
    raise SpecmdError("the model was called without input_ids or inputs_embeds, expected one of them")


def _places(gate: Gate, output: Any, tokens: int) -> Places:
    """Tells a gate's logits, gates and expert ids apart by their shapes and types."""
    torch = sys.modules["torch"]
    parts = list(output) if isinstance(output, tuple | list) else [output]
    matrices = [i for i, part in enumerate(parts) if isinstance(part, torch.Tensor) and part.ndim == 2]
    whole = [i for i in matrices if not parts[i].is_floating_point() and parts[i].shape[0] == tokens]
    real = [i for i in matrices if parts[i].is_floating_point()]
    top_k = parts[whole[0]].shape[1] if whole else 0
    logits = [i for i in real if parts[i].shape == (tokens, gate.experts)][:1]
    shares = [i for i in real if parts[i].shape == (tokens, top_k) and i not in logits]
    if not (len(whole) == len(logits) == len(shares) == 1):
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        found = ", ".join(f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}" for part in tensors)
        raise SpecmdError(
            f"{gate.name} ({type(gate.module).__name__}) gave {found or type(output).__name__} for {tokens} tokens, "
            f"expected (logits [{tokens}, {gate.experts}], gates [{tokens}, k], expert ids [{tokens}, k]) "
            "as the routers of transformers 5 do"
        )
    return Places(len(parts), whole[0], shares[0], logits[0], top_k)


def _copied(output: Any, places: Places, with_logits: bool) -> Routed:
    """Gives the parts of a gate's output, copied: the model may write over its own."""
    torch = sys.modules["torch"]
    return Routed(
        output[places.ids].detach().to(torch.int32, copy=True),
        output[places.gates].detach().to(torch.float32, copy=True),
        output[places.logits].detach().to(torch.float32, copy=True) if with_logits else None,
    )


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.cpu().numpy()
