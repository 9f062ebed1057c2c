"""How fast is the offloaded model on this machine, and what stands between it and the hardware?

    python -m experiments.bench_offload --smoke              # the same steps at toy size, on any machine
    python -m experiments.bench_offload --out results/bench  # OLMoE-1B-7B's shape in bf16, a GPU with 40 GB
    python -m experiments.bench_offload --only fused         # one step; see SECTIONS

Weights are made up. Routing of the timed runs is synthetic with locality (`specmd_jax.trace.synthesize`), fed to the
model in place of its own, because the routing of random weights has none. Steps: copy rates (against torch if it is
there), everything resident in one program, fused beside driven runs, `accelerate`'s cpu_offload of the same shape if
that is installed, driven runs over policies x capacities x prefetch with predicted times, and equality of offloaded and
resident text for both engines.

Prints one table and writes bench.json after every row: what is measured is kept if a later step fails or time ends.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# pinned host memory is limited to 64 GB by default, and torch needs its share of the device's
os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.command_line import main_guard, output_paths, parser
from specmd_jax import moe
from specmd_jax.errors import unknown
from specmd_jax.files import replace_text
from specmd_jax.moe.fused import engine as fused
from specmd_jax.moe.fused import program as passes
from specmd_jax.moe.layerwise import engine as offload
from specmd_jax.moe.measure import predict
from specmd_jax.moe.model.forward import greedy_step, random_experts
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime import slots, store
from specmd_jax.moe.runtime.run import Run
from specmd_jax.replay.totals import FETCHED
from specmd_jax.report.table import versions
from specmd_jax.trace import synthesize
from specmd_jax.types import Trace

Result = dict[str, Any]


class Bench:
    """The model, made once, and what has been measured so far."""

    def __init__(self, toy: bool, seconds: float, host_bytes: int | None):
        self.toy, self.begin_s, self.seconds = toy, time.perf_counter(), seconds
        self.cfg = moe.tiny("olmoe", "bfloat16", num_hidden_layers=3) if toy else moe.published("OLMoE-1B-7B")
        self.name = "tiny" if toy else "OLMoE-1B-7B"
        self.prompt, self.steps, self.requests = (8, 12, 3) if toy else (64, 40, 3)
        key = jax.random.key(0)
        self.params = jax.jit(moe.random_params, static_argnums=0)(self.cfg, key)
        self.stacks = [random_experts(self.cfg, key, layer) for layer in range(len(self.cfg.moe_layers))]
        self.host_bytes = host_bytes
        self.result: Result = {}
        self.path: Path | None = None

    def save(self) -> None:
        """Writes what there is so far: a run that is cut short loses nothing."""
        if self.path is not None:
            replace_text(self.path, json.dumps(self.result, indent=1, default=str) + "\n")

    # made when first asked for: a step may need one of them only
    @functools.cached_property
    def store(self) -> store.PinnedStore:
        return store.pin_stacks(self.cfg, self.stacks, available_bytes=self.host_bytes)

    @functools.cached_property
    def stacked(self) -> store.StackedStore:
        return store.stack(self.cfg, self.stacks, available_bytes=self.host_bytes)

    @property
    def expert_bytes(self) -> int:
        return moe.expert_bytes(self.cfg)

    def engine(self, name: str, capacity: str, prefetch: str, **options: Any) -> offload.Offloaded | fused.Fused:
        options |= {"prefetch": prefetch, "name": self.name}
        if name == "fused":
            return fused.Fused(self.cfg, self.params, self.stacked, "lru", capacity, **options)
        return offload.Offloaded(self.cfg, self.params, self.store, "lru", capacity, **options)

    def trace(self, seed: int) -> Trace:
        """Routing with locality, for all requests."""
        return synthesize(
            layers=len(self.cfg.moe_layers),
            experts=self.cfg.experts,
            top_k=self.cfg.top_k,
            tokens=self.prompt + self.steps,
            requests=self.requests,
            prompt_tokens=self.prompt,
            with_ahead=True,
            stickiness=0.8,
            seed=seed,
            expert_bytes=self.expert_bytes,
        )

    @property
    def left_s(self) -> float:
        return self.seconds - (time.perf_counter() - self.begin_s)

    def prompts(self, count: int | None = None) -> list[Any]:
        rng = np.random.default_rng(1)
        return [rng.integers(0, self.cfg.vocabulary, self.prompt) for _ in range(count or self.requests)]


def median_s(call: Callable[[], Any], repeats: int = 10, warm: int = 2) -> float:
    for _ in range(warm):
        jax.block_until_ready(call())
    took = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - begin)
    return float(np.median(took))


def copies(bench: Bench) -> Result:
    """Pinned host memory to the device, by how many experts are in flight, beside compute, and by torch."""
    device, size = store.sharding(store.DEVICE), bench.expert_bytes
    flat = [expert for row in bench.store.experts for expert in row]
    fetch = slots.fetch(device)
    found: Result = {"expert_bytes": size}
    for count in (1, 2, 8, 32):
        took = median_s(lambda n=count: jax.device_put(flat[:n], device))
        found[f"put_{count}_GB_per_s"] = count * size / took / 1e9
        found[f"put_{count}_s"] = took
    found["put_issue_8_s"] = issue_s(lambda: jax.device_put(flat[:8], device))
    for count in (1, 2, 8):
        found[f"program_{count}_GB_per_s"] = count * size / median_s(lambda n=count: fetch(flat[:n])) / 1e9
    found["program_issue_8_s"] = issue_s(lambda: fetch(flat[:8]))
    n = 256 if bench.toy else 8192
    a = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
    busy = jax.jit(lambda a: jax.lax.fori_loop(0, 8, lambda _, x: (x @ a) / n**0.5, a))
    alone_s, copy_s = median_s(lambda: busy(a)), found["put_32_s"]

    def both() -> Any:
        moved = jax.device_put(flat[:32], device)  # asked for first: a copy waits for programs started before it
        return busy(a), moved

    def reverse() -> Any:
        out = busy(a)
        return out, jax.device_put(flat[:32], device)

    for name, call in (("copy_first", both), ("compute_first", reverse)):
        took = median_s(call)
        found[f"overlap_{name}"] = (alone_s + copy_s - took) / min(alone_s, copy_s)
    found |= {"compute_alone_s": alone_s}
    found |= device_rates(bench)
    if importlib.util.find_spec("torch") and jax.default_backend() == "gpu":
        import torch  # pyright: ignore[reportMissingImports]

        sources = [torch.empty(size // 2, dtype=torch.bfloat16).pin_memory() for _ in range(32)]
        targets = [torch.empty_like(source, device="cuda") for source in sources]
        for count in (1, 8, 32):
            rounds = []
            for _ in range(8):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for source, target in zip(sources[:count], targets[:count], strict=True):
                    target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()
                rounds.append(time.perf_counter() - begin)
            found[f"torch_{count}_GB_per_s"] = count * size / float(np.median(rounds)) / 1e9
        del sources, targets
    return found


def device_rates(bench: Bench) -> Result:
    """GB/s of the device's own memory, by copying and by summing."""
    big = jnp.zeros((1 << 20) if bench.toy else (4 << 30), jnp.bfloat16) + 1
    twice = jax.jit(lambda x: x * 2)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    written, read = 2 * big.nbytes / median_s(lambda: twice(big)), big.nbytes / median_s(lambda: total(big))
    return {
        "device_copy_GB_per_s": written / 1e9,
        "device_read_GB_per_s": read / 1e9,
        "device_GB_per_s": max(written, read) / 1e9,
    }


def issue_s(call: Callable[[], Any], repeats: int = 20) -> float:
    """Host time until a call returns, its work not waited for."""
    took = []
    for _ in range(repeats):
        begin = time.perf_counter()
        out = call()
        took.append(time.perf_counter() - begin)
        jax.block_until_ready(out)
    return float(np.median(took))


def resident(bench: Bench) -> Result:
    """One decode step with every expert on the device as one program, against reading the active weights once."""
    cfg, params, stacks = bench.cfg, bench.params, tuple(bench.stacks)
    net = moe.build(cfg)
    cache = moe.init_cache(cfg, 1, bench.prompt + bench.steps)
    token, at = jnp.ones(1, jnp.int32), jnp.full(1, bench.prompt, jnp.int32)
    dense = tree_bytes(params) - tree_bytes(params["embed"])
    active = dense + bench.expert_bytes * cfg.top_k * len(cfg.moe_layers) + 2 * tree_bytes(cache)
    rate = (bench.result.get("copies") or device_rates(bench))["device_GB_per_s"] * 1e9
    many = 16 if bench.toy else 64

    @jax.jit
    def loop(p: Any, s: Any, token: Any, cache: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            token, cache = carry
            token, _, cache, _ = greedy_step(net, p, s, token, cache, at)
            return (token, cache), token

        return jax.lax.scan(body, (token, cache), None, length=many)[1]

    loop_s = median_s(lambda: loop(params, stacks, token, cache), 5, 1) / many
    found: Result = {"step_in_loop_s": loop_s, "active_bytes": active}
    found |= {
        "device_GB_per_s": rate / 1e9,
        "bandwidth_bound_s": active / rate,
        "ratio_to_bound": loop_s * rate / active,
    }
    if bench.left_s < (5 if bench.toy else 90):
        return found | {"stopped": "out of time"}
    bench.result["resident"] = found
    bench.save()
    step = jax.jit(lambda p, s, t, c, at: greedy_step(net, p, s, t, c, at)[:3], donate_argnums=3)
    took = []
    for _ in range(30):
        begin = time.perf_counter()
        token, _, cache = jax.block_until_ready(step(params, stacks, token, cache, at))
        took.append(time.perf_counter() - begin)
    return found | {"step_s": float(np.median(took[5:]))}


def equality(bench: Bench) -> Result:
    """Offloaded against resident on this machine: tokens and all router logits."""
    cfg, prompts, steps = bench.cfg, bench.prompts(1), 8
    whole = moe.generate(cfg, bench.params, bench.stacks, prompts[0][None], steps)
    expected = np.concatenate(
        [np.asarray(whole.prefill.logits)[:, 0].swapaxes(0, 1), np.asarray(whole.decode.logits)[:, :, 0, 0]]
    )
    found: Result = {}
    for name, capacity in (("driven", "10%"), ("driven", "100%"), ("fused", "10%")):
        run = bench.engine(name, capacity, "none", keep_logits=True).generate(prompts, steps)
        assert run.trace.logits is not None
        found[f"{name}_tokens_equal_{capacity}"] = bool(np.array_equal(run.tokens, whole.tokens))
        found[f"{name}_router_logits_equal_{capacity}"] = bool(np.array_equal(run.trace.logits, expected))
        found[f"{name}_router_logits_max_difference_{capacity}"] = float(np.abs(run.trace.logits - expected).max())
    return found


def fused_beside_driven(bench: Bench) -> Result:
    """The same requests by both engines: all resident, and with a quarter of the experts."""
    trace, prompts = bench.trace(3), bench.prompts()
    found: Result = {"rows": []}
    bench.result["fused"] = found
    found["loop_GB_per_s"] = link = loop_rate(bench)
    for capacity, prefetch in (("25%", "none"), ("100%", "none"), ("25%", "gate_ahead")):
        for name in ("fused", "driven"):
            # programs of their own for prefetching: not at the price of the steps that follow
            if bench.left_s < (5 if bench.toy else 40 if prefetch == "none" else 120):
                return found | {"stopped": "out of time"}
            begin = time.perf_counter()
            try:
                engine = bench.engine(name, capacity, prefetch)
                run = engine.generate(prompts, bench.steps, trace)
            except Exception as error:  # the other engine's numbers are worth having
                found["rows"].append({"engine": name, "capacity": capacity, "failed": _line(error)})
                bench.save()
                traceback.print_exc()
                continue
            ttft_s, tpot_s = predict.measured(run, 1)
            copied, equal = copies_a_pass(engine, run)
            found["rows"].append(
                {
                    "engine": name,
                    "eviction": "lru",
                    "capacity": capacity,
                    "prefetch": prefetch,
                    "events_equal": equal,
                    "copies_per_token": copied,
                    "ttft_s": ttft_s,
                    "tpot_s": tpot_s,
                    "link_bound_s": copied * bench.expert_bytes / (link * 1e9),
                    "with_compiling_s": time.perf_counter() - begin,
                    "host_us_a_layer": host_us(run),
                }
            )
            bench.save()
    return found


def host_us(run: Run) -> str:
    """Median microseconds of the host in a decoded layer, by what it does."""
    if run.host_s is None:
        return "none"
    parts = np.median(run.host_s[len(run.host_s) // 3 :], axis=0)  # the first of the requests fills the cache
    return ", ".join(
        f"{name} {1e6 * p:.0f}" for name, p in zip(("wait", "choose", "start", "decide"), parts, strict=True)
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def loop_rate(bench: Bench) -> float:
    """GB/s of experts copied one after the other by a loop in a program, as the fused engine does."""
    held, count = bench.stacked, 8 if bench.toy else 64
    places = jax.tree.map(lambda leaf: jnp.zeros((4, *leaf.shape[1:]), leaf.dtype), held.stack)

    @functools.partial(jax.jit, donate_argnums=1)
    def copy(host: Any, places: Any, flat: Any) -> Any:
        rows = passes.Copies(flat, flat % 4, jnp.int32(0), jnp.int32(count))
        return passes.copy_all(host, places, rows, jnp.int32(0))

    flat, took = jnp.arange(count, dtype=jnp.int32), []
    for _ in range(6):
        jax.block_until_ready(places)
        begin = time.perf_counter()
        places = jax.block_until_ready(copy(held.stack, places, flat))
        took.append(time.perf_counter() - begin)
    return count * bench.expert_bytes / float(np.median(took[1:])) / 1e9


def copies_a_pass(engine: Any, run: Run) -> tuple[float, bool]:
    """Experts copied a decode pass, the first request left out; and whether all events are the simulator's."""
    replays, events = engine.policy.replay(run.trace)
    decode = (replays.schedule.phase == 1) & (replays.schedule.request > 0)
    copied = sum(int((d.outcome == FETCHED).sum() + (d.prefetched > 0).sum()) for d in np_rows(run, decode))
    return copied / int((replays.schedule.starts_pass & decode).sum()), run.events_equal(events)


def driven(bench: Bench) -> Result:
    """Measured and predicted times over policies, capacities and prefetching; rates from two runs of their own."""
    cfg = bench.cfg
    trace, other = bench.trace(3), bench.trace(4)
    prompts = bench.prompts()

    def engine(eviction: str, capacity: str, prefetch: str) -> offload.Offloaded:
        return offload.Offloaded(cfg, bench.params, bench.store, eviction, capacity, prefetch=prefetch, name=bench.name)

    rates: dict[str, predict.Rates] = {}

    def other_run(capacity: str, prefetch: str) -> tuple[Any, Run]:
        own = engine("lru", capacity, prefetch)
        return own.policy, own.generate(prompts, bench.steps, other)

    everything = other_run("100%", "none")[1]
    rates["none"] = predict.fit(everything, other_run("30%", "none")[1])
    resident_tpot_s = predict.measured(everything, 1)[1]
    found: Result = {"rates": {}, "rows": []}
    found["all_resident_driven_tpot_s"] = resident_tpot_s
    resident_s = bench.result.get("resident", {}).get("step_in_loop_s", resident_tpot_s)
    link = (
        bench.result["copies"]["put_32_GB_per_s"] * 1e9
        if "copies" in bench.result
        else bench.expert_bytes / rates["none"].copy_s
    )
    keeper_s: list[float] = []
    for prefetch in ("none", "gate_ahead"):  # what says most comes first: time may end
        for capacity in ("25%", "50%", "12.5%", "75%"):
            for eviction in ("lru", "lfu", "least_stale", "slru"):
                if bench.left_s < (5 if bench.toy else 15):
                    found["stopped"] = "out of time"
                    return found
                if prefetch not in rates:
                    runs = other_run("100%", prefetch)[1], *other_run("30%", prefetch)
                    rates[prefetch] = predict.fit_prefetch(rates["none"], *runs)
                found["rates"] = {name: row._asdict() for name, row in rates.items()}
                own = engine(eviction, capacity, prefetch)
                run = own.generate(prompts, bench.steps, trace)
                ttft_s, tpot_s = predict.measured(run, 1)
                guess = predict.predict(own.policy, run.trace, rates[prefetch], 1)
                copied, equal = copies_a_pass(own, run)
                link_s = copied * bench.expert_bytes / link
                found["rows"].append(
                    {
                        "eviction": eviction,
                        "capacity": capacity,
                        "prefetch": prefetch,
                        "events_equal": equal,
                        "copies_per_token": copied,
                        "ttft_s": ttft_s,
                        "tpot_s": tpot_s,
                        "predicted_ttft_s": guess.ttft_s,
                        "predicted_tpot_s": guess.tpot_s,
                        "ttft_error": guess.ttft_s / ttft_s - 1,
                        "tpot_error": guess.tpot_s / tpot_s - 1,
                        "link_bound_s": link_s,
                        "over_bound": tpot_s / max(link_s, resident_s),
                        "most_resident": run.most_resident,
                    }
                )
                bench.result["driven"] = found
                bench.save()
    own = engine("lru", "25%", "none")
    gate = offload.Gate(trace.expert_ids[:1, 0].astype(np.int32), np.ones((1, cfg.top_k), np.float32))
    for visit in range(200):
        begin = time.perf_counter()
        own.keeper.visit(visit % len(cfg.moe_layers), visit // len(cfg.moe_layers), True, gate)
        keeper_s.append(time.perf_counter() - begin)
    found["decision_s"] = float(np.median(keeper_s[20:]))
    return found


def np_rows(run: Run, rows: Any) -> list[Any]:
    return [run.decisions[i] for i in np.flatnonzero(rows)]


def accelerated(bench: Bench) -> Result:
    """`accelerate.cpu_offload` of the same shape: every module's weights go to the device for each pass."""
    if bench.toy or not importlib.util.find_spec("accelerate") or jax.default_backend() != "gpu":
        return {"left out": "toy size" if bench.toy else "needs a GPU and accelerate"}
    import torch  # pyright: ignore[reportMissingImports]
    from accelerate import cpu_offload  # pyright: ignore[reportMissingImports]
    from transformers import OlmoeConfig, OlmoeForCausalLM  # pyright: ignore[reportMissingImports]

    config = OlmoeConfig(**{k: v for k, v in moe.PUBLISHED["OLMoE-1B-7B"].items() if k != "model_type"})
    begin = time.perf_counter()
    with torch.device("meta"):
        model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model = cpu_offload(model.eval(), execution_device=torch.device("cuda:0"))
    made_s = time.perf_counter() - begin
    ids = torch.tensor(bench.prompts(1)[0][None]).cuda()
    took, past, fed = [], None, ids  # the first pass warms up, the second is the timed prefill
    with torch.no_grad():
        for step in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            out = model(fed, past_key_values=past, use_cache=True)
            torch.cuda.synchronize()
            took.append(time.perf_counter() - begin)
            past, fed = (out.past_key_values, out.logits[:, -1:].argmax(-1)) if step else (None, ids)
    return {"made_s": made_s, "first_pass_s": took[0], "ttft_s": took[1], "tpot_s": float(np.mean(took[2:]))}


SECTIONS: dict[str, Callable[[Bench], Result]] = {
    "copies": copies,
    "resident": resident,
    "fused": fused_beside_driven,
    "accelerate": accelerated,
    "driven": driven,
    "equality": equality,
}


def table(result: Result) -> str:
    """Everything measured, one line each."""
    lines = []
    for section, values in result.items():
        lines.append(f"== {section}")
        if not isinstance(values, dict):
            lines.append(str(values))
            continue
        for name, value in values.items():
            if name != "rows":
                lines.append(f"{name:34} {value:.6g}" if isinstance(value, float) else f"{name:34} {value}")
        for row in values.get("rows", []):
            shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            lines.append("  ".join(shown))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "bench_offload")
    options.add_argument("--seconds", type=float, default=420.0, help="leave out what would take longer (default: 420)")
    options.add_argument(
        "--host-gb", type=float, help="host memory to use, where the system says less than it gives (default: ask it)"
    )
    options.add_argument("--only", help=f"some of: {', '.join(SECTIONS)}")
    args = options.parse_args(argv)
    sections = args.only.split(",") if args.only else list(SECTIONS)
    for name in sections:
        if name not in SECTIONS:
            raise unknown("step", name, SECTIONS)
    (path,) = output_paths(args, "bench.json")
    path = Path(path)
    bench = Bench(args.smoke, args.seconds, None if args.host_gb is None else int(args.host_gb * 1e9))
    bench.path = path
    bench.result["setting"] = {
        "model": bench.name,
        "device": str(jax.devices()[0].device_kind),
        "versions": versions(),
        "prompt_tokens": bench.prompt,
        "decoded_tokens": bench.steps,
        "requests": bench.requests,
        "made_s": time.perf_counter() - bench.begin_s,
    }
    for name in sections:
        begin = time.perf_counter()
        try:
            bench.result[name] = SECTIONS[name](bench)
        except Exception as error:  # the other steps' numbers are worth keeping
            bench.result[f"{name} failed"] = _line(error)
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        bench.save()
    print(table(bench.result))


if __name__ == "__main__":
    main_guard(main)
