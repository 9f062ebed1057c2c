"""From a checkpoint folder (``config.json`` and ``*.safetensors``) to dense parameters and a host store of experts.

Shards are mapped and read tensor by tensor. A dense tensor goes straight to the device. An expert goes straight to
its place in the host store: a tuple with one `Expert` for each layer that has any, whose leaves are numpy arrays
[E, ...], each one contiguous allocation. Beyond the store itself the host holds one expert at a time (more only for
the page cache, which the system takes back when it needs to), the device none.

A caller that keeps experts elsewhere (pinned memory, one array per expert) loops over `read_expert` instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint.folder import Checkpoint, load_config
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model import families, quant
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.forward import Params, param_spec
from specmd_jax.units import GIB

Store = tuple[Expert, ...]


def load(
    folder: str | os.PathLike[str],
    dtype: str | None = None,
    precision: str | None = None,
    group: int | None = None,
    check_finite: bool = False,
) -> tuple[MoEConfig, Params, Store]:
    """Loads configuration, dense parameters (to the device) and expert store (to the host) of a checkpoint folder.

    Everything is checked for presence, shape and type before the first allocation.

    Args:
        dtype: type of dense weights and activations; None: the checkpoint's own.
        precision, group: of the experts, see `quant.matrix_spec`; None: ``dtype``.
        check_finite: read every weight once more and refuse NaN and infinities.
    """
    cfg, checkpoint = load_config(folder, dtype), Checkpoint(folder)
    verify(checkpoint, cfg, precision)
    params = load_dense(checkpoint, cfg, check_finite)
    return cfg, params, load_experts(checkpoint, cfg, precision, group, check_finite)


def verify(checkpoint: Checkpoint, cfg: MoEConfig, precision: str | None = None) -> None:
    """Checks that every tensor the model needs is there with the right shape and type; reads no data."""
    spec = param_spec(cfg)
    for path, name in families.dense_names(cfg, spec).items():
        checkpoint.tensor(name, _at(spec, path).shape)
    for layer in cfg.moe_layers:
        for expert in range(1 if families.FAMILIES[cfg.family].stacked else cfg.experts):
            _expert_views(checkpoint, cfg, layer, expert, precision)


def load_dense(
    checkpoint: Checkpoint,
    cfg: MoEConfig,
    check_finite: bool = False,
    put: Callable[[npt.NDArray[Any]], Any] | None = None,
) -> Params:
    """Gives all parameters but the routed experts, tensor by tensor onto the device, in ``cfg.dtype``.

    Args:
        put: places one array; None: a copy on the default device.
    """
    spec = param_spec(cfg)
    put = put or (lambda array: jnp.array(array, copy=True))
    for path, name in families.dense_names(cfg, spec).items():
        leaf = _at(spec, path)
        tensor = checkpoint.tensor(name, leaf.shape)
        if check_finite:
            _must_be_finite(checkpoint, name, tensor)
        _at(spec, path[:-1])[path[-1]] = put(tensor.astype(leaf.dtype, copy=False))
    if cfg.tied:
        spec["head"]["project"]["weight"] = spec["embed"]["weight"]
    return spec


def load_experts(
    checkpoint: Checkpoint,
    cfg: MoEConfig,
    precision: str | None = None,
    group: int | None = None,
    check_finite: bool = False,
    available_bytes: int | None = None,
) -> Store:
    """Gives the host store of all routed experts: one `Expert` per MoE layer with numpy leaves [E, ...].

    Args:
        available_bytes: memory the store may take; None: what the system says is free.
    Raises:
        SpecmdError: the store does not fit (before anything is allocated); see also `Checkpoint.tensor`.
    """
    store = empty_store(cfg, precision, group, available_bytes)
    for index, layer in enumerate(cfg.moe_layers):
        for expert in range(cfg.experts):
            out = jax.tree.map(lambda leaf, e=expert: leaf[e], store[index])
            _fill_expert(checkpoint, cfg, layer, expert, out, precision, group, check_finite)
    return store


def empty_store(
    cfg: MoEConfig, precision: str | None = None, group: int | None = None, available_bytes: int | None = None
) -> Store:
    """Allocates memory for a host store, not yet filled; raises SpecmdError when it does not fit, naming what would."""
    need = store_bytes(cfg, precision, group)
    room = available_memory_bytes() if available_bytes is None else available_bytes
    if need > room:
        fits = [f"{p} {store_bytes(cfg, p) / GIB:.1f}" for p in ("int8", "int4") if store_bytes(cfg, p) < need]
        advice = f"; smaller: {', '.join(fits)} GiB" if fits else ""
        raise SpecmdError(
            f"{cfg.family}: the experts at {precision or cfg.dtype} need {need / GIB:.1f} GiB of host memory, "
            f"{room / GIB:.1f} GiB are free{advice}"
        )
    spec = moe_experts.expert_spec(cfg, precision, group)
    return tuple(
        jax.tree.map(lambda leaf: np.empty((cfg.experts, *leaf.shape), leaf.dtype), spec) for _ in cfg.moe_layers
    )


def store_bytes(cfg: MoEConfig, precision: str | None = None, group: int | None = None) -> int:
    """Gives the exact bytes of all routed experts at a precision."""
    return len(cfg.moe_layers) * cfg.experts * moe_experts.expert_bytes(cfg, precision, group)


def available_memory_bytes() -> int:
    """Gives memory this process may still take: what the system has free, or less where a control group limits it."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, max(int(limit.read_text()) - int(used.read_text()), 0))
    return free


def iter_experts(cfg: MoEConfig) -> Iterator[tuple[int, int, int]]:
    """Gives (index among the MoE layers, layer of the model, expert) of every routed expert, in storage order."""
    for index, layer in enumerate(cfg.moe_layers):
        for expert in range(cfg.experts):
            yield index, layer, expert


def read_expert(
    checkpoint: Checkpoint,
    cfg: MoEConfig,
    layer: int,
    expert: int,
    precision: str | None = None,
    group: int | None = None,
    check_finite: bool = False,
) -> Expert:
    """Gives one routed expert as freshly allocated numpy leaves, for callers that place experts themselves.

    Args:
        layer: layer of the model (an entry of ``cfg.moe_layers``).
    """
    out = jax.tree.map(lambda s: np.empty(s.shape, s.dtype), moe_experts.expert_spec(cfg, precision, group))
    _fill_expert(checkpoint, cfg, layer, expert, out, precision, group, check_finite)
    return out


def quantize_expert(expert: Expert, precision: str, group: int | None = None) -> Expert:
    """Gives a float expert (numpy leaves) at another precision; biases stay as they are."""
    return expert._replace(
        gate_up=quant.quantize(expert.gate_up, precision, group), down=quant.quantize(expert.down, precision, group)
    )


def _expert_views(
    checkpoint: Checkpoint, cfg: MoEConfig, layer: int, expert: int, precision: str | None
) -> dict[str, npt.NDArray[Any]]:
    """Gives the views of what the checkpoint holds of one expert, with rows [out, in] and shapes checked."""
    names, (width, inner) = families.expert_names(cfg, layer, expert), (cfg.width, cfg.expert_width)
    if not families.FAMILIES[cfg.family].stacked:
        if precision == "mxfp4":
            raise SpecmdError(f"{cfg.family}: the checkpoint holds no mxfp4 experts (choose int4)")
        shapes = ((inner, width), (inner, width), (width, inner))
        tensors = (checkpoint.tensor(name, shape) for name, shape in zip(names, shapes, strict=True))
        return dict(zip(("gate", "up", "down"), tensors, strict=True))
    gate_up, down = names
    views: dict[str, npt.NDArray[Any]] = {}
    for part, name, rows, columns in (("gate_up", gate_up, 2 * inner, width), ("down", down, width, inner)):
        if f"{name}_blocks" in checkpoint:
            blocks = columns // quant.MX_BLOCK
            packed = (cfg.experts, rows, blocks, quant.MX_BLOCK // 2)
            codes = checkpoint.tensor(f"{name}_blocks", packed, ("U8",))[expert]
            views[f"{part}_codes"] = codes.reshape(rows, columns // 2)
            views[f"{part}_scales"] = checkpoint.tensor(f"{name}_scales", packed[:3], ("U8",))[expert]
        elif precision == "mxfp4":
            raise SpecmdError(f"{cfg.family}: the checkpoint holds no mxfp4 experts (choose int4)")
        else:  # unpacked, these are stored [in, out]
            views[part] = checkpoint.tensor(name, (cfg.experts, columns, rows))[expert].T
        views[f"{part}_bias"] = checkpoint.tensor(f"{name}_bias", (cfg.experts, rows))[expert]
    return views


def _fill_expert(
    checkpoint: Checkpoint,
    cfg: MoEConfig,
    layer: int,
    expert: int,
    out: Expert,
    precision: str | None,
    group: int | None,
    check_finite: bool,
) -> None:
    """Writes one expert into ``out``, whose leaves are writable numpy views."""
    precision = precision or cfg.dtype
    views = _expert_views(checkpoint, cfg, layer, expert, precision)
    if check_finite:
        names = families.expert_names(cfg, layer, expert)
        for part, view in views.items():
            name = names[("gate", "up", "down").index(part)] if part in ("gate", "up") else names[-1]
            if view.dtype != np.uint8:
                _must_be_finite(checkpoint, f"{name} ({part} of expert {expert})", view)
    if "gate" in views:
        gate, up, down = views["gate"], views["up"], views["down"]
        if precision in quant.BITS and quant.BITS[precision] >= 16:  # copied in place, no expert of temporary memory
            out.gate_up[: cfg.expert_width], out.gate_up[cfg.expert_width :] = gate, up
            out.down[...] = down
        else:
            _assign(out.gate_up, quant.quantize(np.concatenate([gate, up]), precision, group))
            _assign(out.down, quant.quantize(down, precision, group))
        return
    # gpt-oss interleaves gate and up rows; here the gate rows come first
    for part, leaf in (("gate_up", out.gate_up), ("down", out.down)):
        apart = _rows_apart if part == "gate_up" else _rows_kept
        if f"{part}_codes" not in views:
            _assign(leaf, quant.quantize(apart(views[part]), precision, group))
            continue
        packed = quant.MXFP4(apart(views[f"{part}_codes"]), apart(views[f"{part}_scales"]))
        if precision == "mxfp4":
            _assign(leaf, packed)
        else:
            _assign(leaf, quant.quantize(decode_mxfp4(packed), precision, group))
    out.gate_up_bias[...] = _rows_apart(views["gate_up_bias"])
    out.down_bias[...] = views["down_bias"]


def decode_mxfp4(packed: quant.MXFP4) -> npt.NDArray[np.float32]:
    """Gives one mxfp4 matrix decoded on the host, as `quant.matmul` reads it; every bfloat16 of it is exact."""
    pair = np.stack([packed.codes & 15, packed.codes >> 4], axis=-1).reshape(packed.codes.shape[0], -1)
    values = np.asarray(quant.FP4_VALUES, np.float32)[pair]
    grouped = values.reshape(values.shape[0], -1, quant.MX_BLOCK)
    return np.ldexp(grouped, packed.scales.astype(np.int32)[:, :, None] - 127).reshape(values.shape)


def _rows_apart(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([rows[0::2], rows[1::2]])


def _rows_kept(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return rows


def _assign(out: quant.Leaf, value: quant.Leaf) -> None:
    for target, source in zip(jax.tree.leaves(out), jax.tree.leaves(value), strict=True):
        target[...] = source


def _must_be_finite(checkpoint: Checkpoint, name: str, tensor: npt.NDArray[Any]) -> None:
    bad = int(tensor.size - np.count_nonzero(np.isfinite(tensor)))
    if bad:
        shard = checkpoint.where(name.split(" ")[0])
        raise SpecmdError(f"{shard}: {name} holds {bad} values that are NaN or infinite")


def _at(tree: Mapping[Any, Any], path: tuple[str | int, ...]) -> Any:
    node: Any = tree
    for key in path:
        node = node[key]
    return node
