"""`HARDWARE`: what a link, a device and a host can do. The only place that speaks of GB/s.

A preset is a starting point: `HARDWARE_NOTES` says for each of its numbers where it comes from and whether it was
``measured``, is ``nominal`` (a data sheet) or ``estimated``. Change a number with ``hardware("rtx4090").replace(...)``;
keep calibrated ones in a JSON file with `save_hardware` and pass its path wherever a name is accepted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import flax.struct
import numpy as np

from specmd_jax.errors import SpecmdError, find, unknown
from specmd_jax.files import replace_text
from specmd_jax.units import GB, MIB

TFLOP = 1e12

Evidence: TypeAlias = Literal["measured", "nominal", "estimated"]
EVIDENCE: tuple[str, ...] = get_args(Evidence)
MARK = ":"  # between the name of a preset and numbers that replace its own
_FORMAT = "specmd-jax hardware 1"


class Hardware(flax.struct.PyTreeNode):
    """Rates and overheads of one machine. Every field is a leaf, so a study can `vmap` over any of them.

    Rates may be infinite and overheads zero: times are ``overhead + amount / rate``, so all stay finite. In the preset
    ``infinite`` only the link and the launches are free; what remains is the device's computation. The constructor
    checks nothing, because fields may be traced arrays; `hardware` does.
    """

    link_bytes_per_s: float  # host memory (or storage) to device
    link_latency_s: float  # before the first byte of a copy
    peak_flops_per_s: float  # device, 16-bit matrix multiplication, dense
    memory_bytes_per_s: float  # device memory
    launch_s: float  # overhead of one expert, and of the dense part of one layer
    host_flops_per_s: float  # for experts that run on the CPU
    host_bytes_per_s: float  # host memory, which copies over the link and experts on the host share
    host_moe_bytes_per_s: float = math.inf  # at which the host's expert kernels read, if that is less than its memory
    handover_s: float = 0.0  # of a visit with experts on the host: to the host and back
    sync_s: float = 0.0  # by which the engine prolongs every layer as it waits for the device
    layer_s: float = 0.0  # launches of a layer, whatever the number of its experts
    overlaps: float = 1.0  # 1: residents compute while others are copied; 0: when all are there; or in between
    storage_bytes_per_s: float = math.inf  # storage to host memory, where host memory does not hold everything
    storage_latency_s: float = 0.0  # before the first byte of a read


RATES = (
    "link_bytes_per_s",
    "peak_flops_per_s",
    "memory_bytes_per_s",
    "host_flops_per_s",
    "host_bytes_per_s",
    "host_moe_bytes_per_s",
    "storage_bytes_per_s",
)
OVERHEADS = ("link_latency_s", "launch_s", "handover_s", "sync_s", "layer_s", "storage_latency_s")
SHARES = ("overlaps",)


@dataclass(frozen=True)
class HardwareNotes:
    """Where a preset's numbers come from."""

    source: str
    evidence: Mapping[str, Evidence] = field(default_factory=dict)  # field of `Hardware` -> how it is known


def hardware(machine: str | Path | Hardware) -> Hardware:
    """`machine` itself (its fields may be arrays, but not traced), the preset of that name (in any case), or the preset
    in a ``.json`` file. Numbers behind a name replace the preset's: ``rtx4090:overlaps=0:handover_s=3e-5``.

    Raises `SpecmdError` naming the field if a rate is not positive, an overhead is negative or not finite, or a share
    is not within 0..1.
    """
    if isinstance(machine, Hardware):
        _check(machine, "hardware")
        return machine
    name, *changes = str(machine).split(MARK) if "=" in str(machine) else [str(machine)]
    if isinstance(machine, Path) or name.lower().endswith(".json"):
        found = load_hardware(name)[0]
    else:
        found = HARDWARE[find("hardware", name, HARDWARE)]
    return _changed(found, changes, str(machine)) if changes else found


def _changed(machine: Hardware, changes: list[str], place: str) -> Hardware:
    """Gives the machine with numbers replaced, each as "field=number"."""
    values: dict[str, Any] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in (names := [leaf.name for leaf in fields(Hardware)]):
            raise unknown(f"field in hardware {place!r}:", name, names)
        try:
            values[name] = float(text)
        except ValueError:
            raise SpecmdError(f"hardware {place!r}: {name} is {text!r}, expected a number") from None
    found = machine.replace(**values)
    _check(found, f"hardware {place!r}")
    return found


def with_storage(machine: str | Path | Hardware, storage: str | Path | Hardware) -> Hardware:
    """Gives `machine` with the link of `storage` (such as the preset "nvme-4") between its storage and host memory.

    Raises SpecmdError as `hardware` does.
    """
    found = hardware(storage)
    return hardware(machine).replace(storage_bytes_per_s=found.link_bytes_per_s, storage_latency_s=found.link_latency_s)


def save_hardware(machine: Hardware, path: str | Path, notes: HardwareNotes) -> None:
    """Writes a preset that ``hardware(path)`` reads; `notes` say where the numbers come from.

    Raises `SpecmdError` if a number is out of range, or if `path` does not end in ``.json``.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise SpecmdError(f"{path}: a hardware file must end in .json")
    _check(machine, "hardware")
    _check_notes(notes, "hardware notes")
    values: dict[str, float | str] = {}
    for name, value in _items(machine):
        if np.ndim(value):
            raise SpecmdError(f"{path}: {name} has shape {np.shape(value)}: a hardware file holds one machine")
        values[name] = float(value) if math.isfinite(value) else "inf"  # JSON has no infinity
    document = {
        "format": _FORMAT,
        "hardware": values,
        "source": notes.source,
        "evidence": dict(notes.evidence),
    }
    replace_text(path, json.dumps(document, indent=2) + "\n")


def load_hardware(path: str | Path) -> tuple[Hardware, HardwareNotes]:
    """Reads a preset that `save_hardware` wrote, and its notes. A field with a default may be missing: the file may be
    older. Raises `SpecmdError` naming the file and the field.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecmdError(f"{path}: cannot read hardware: {str(error).splitlines()[0]}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise SpecmdError(f'{path}: expected a hardware file with "format": {json.dumps(_FORMAT)}')

    values, names = document.get("hardware"), [leaf.name for leaf in fields(Hardware)]
    needed = [leaf.name for leaf in fields(Hardware) if leaf.default is MISSING]
    if not isinstance(values, dict) or not set(needed) <= set(values) <= set(names):
        got = sorted(values) if isinstance(values, dict) else values
        optional = ", ".join(sorted(set(names) - set(needed)))
        raise SpecmdError(
            f'{path}: expected the fields {", ".join(sorted(needed))} in "hardware", and perhaps {optional}; got {got}'
        )
    for name, value in values.items():
        if isinstance(value, list | dict):
            raise SpecmdError(f"{path}: {name} is {value!r}: expected a number")
    machine = Hardware(**{name: math.inf if value == "inf" else value for name, value in values.items()})
    _check(machine, str(path))

    evidence = document.get("evidence", {})
    if not isinstance(evidence, dict):
        raise SpecmdError(f'{path}: expected an object in "evidence", got {evidence!r}')
    notes = HardwareNotes(str(document.get("source", "")), evidence)
    _check_notes(notes, str(path))
    return machine, notes


def _items(machine: Hardware) -> Iterator[tuple[str, Any]]:
    return ((leaf.name, getattr(machine, leaf.name)) for leaf in fields(machine))


def _check(machine: Hardware, place: str) -> None:
    for name, value in _items(machine):
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "iuf":
            raise SpecmdError(f"{place}: {name} is {value!r}: expected a number")
        good, expected = numbers > 0, "a positive rate"  # NaN is neither
        if name in OVERHEADS:
            good, expected = (numbers >= 0) & np.isfinite(numbers), "a finite time of at least 0 seconds"
        elif name in SHARES:
            good, expected = (numbers >= 0) & (numbers <= 1), "a share, 0 to 1"
        if not good.all():
            raise SpecmdError(f"{place}: {name} is {numbers[~good].flat[0]}: expected {expected}")


def _check_notes(notes: HardwareNotes, place: str) -> None:
    names = [leaf.name for leaf in fields(Hardware)]
    for name, kind in notes.evidence.items():
        if name not in names:
            raise unknown(f"field in the evidence of {place}:", name, names)
        if kind not in EVIDENCE:
            raise SpecmdError(f"{place}: evidence of {name} is {kind!r}: expected one of {', '.join(EVIDENCE)}")


@dataclass(frozen=True)
class _Part:
    """A link, a device or a host: some fields of `Hardware`, how each is known, and the source."""

    values: Mapping[str, float]
    evidence: tuple[Evidence, ...]  # in the order of `values`
    source: str


def _link(bytes_per_s: float, latency_s: float, evidence: tuple[Evidence, Evidence], source: str) -> _Part:
    return _Part({"link_bytes_per_s": bytes_per_s, "link_latency_s": latency_s}, evidence, f"link: {source}")


def _device(
    flops_per_s: float,
    bytes_per_s: float,
    launch_s: float,
    evidence: tuple[Evidence, Evidence, Evidence],
    source: str,
    layer_s: float = 0.0,
) -> _Part:
    """`evidence` of the peak, of memory, and of what is launched."""
    values = {"peak_flops_per_s": flops_per_s, "memory_bytes_per_s": bytes_per_s, "launch_s": launch_s}
    return _Part(values | {"layer_s": layer_s}, (*evidence, evidence[-1]), f"device: {source}")


def _host(
    flops_per_s: float,
    bytes_per_s: float,
    evidence: tuple[Evidence, Evidence],
    source: str,
    moe_share: float = 0.75,
    handover_s: float = 20e-6,
    moe: Evidence = "estimated",
) -> _Part:
    """`moe_share`: of the memory's rate that expert kernels reach, and how that is known."""
    values = {"host_flops_per_s": flops_per_s, "host_bytes_per_s": bytes_per_s}
    values |= {"host_moe_bytes_per_s": moe_share * bytes_per_s, "handover_s": handover_s}
    return _Part(values, (*evidence, moe, "estimated"), f"host: {source}")


# Links. Sustained rates as a program sees them, not the signalling rate of the bus.
_UFS_4 = _link(
    2460.0 * MIB,
    100e-6,
    ("measured", "estimated"),
    "UFS 4 of a OnePlus 15R, ceiling of random uncached reads when cold, 1645 MiB/s when hot "
    "(BigMoeOnEdge, iobench-ceiling.md)",
)
_NVME_4 = _link(
    6.4 * GB,
    100e-6,
    ("measured", "estimated"),
    "Phison E27T, PCIe 4.0 x4, uncached reads of 18 MiB (github.com/0xBakeer/deepseek-v41-flash-spark/issues/2)",
)
_NVME_5 = _link(
    10.7 * GB,
    100e-6,
    ("measured", "estimated"),
    "Samsung 9100 PRO, PCIe 5.0 x4, uncached reads of 19 MB by 8 threads (github.com/JustVugg/colibri/issues/65)",
)
_APPLE_SSD = _link(
    11.1 * GB,
    122e-6,
    ("measured", "measured"),
    "M5 Max, uncached random reads of 9.3 MiB one at a time, by 9 threads 14.1 GB/s "
    "(github.com/antirez/ds4/issues/491), latency of a small read (github.com/ml-explore/mlx-lm/issues/1438)",
)
_PCIE_3 = _link(
    12.2 * GB,
    10e-6,
    ("measured", "estimated"),
    "P100 PCIe, pinned memory, bandwidthTest (github.com/mpicbg-scicomp/gearshifft/pull/82)",
)
_PCIE_4 = _link(
    25.1 * GB,
    10e-6,
    ("measured", "estimated"),
    "A100, pinned memory, nvbandwidth (github.com/NVIDIA/nvbandwidth/issues/42)",
)
_PCIE_4_ADA = _link(
    26.3 * GB,
    10e-6,
    ("measured", "estimated"),
    "RTX 4090, pinned memory, nvbandwidth (github.com/NVIDIA/nvbandwidth/issues/15)",
)
_PCIE_5 = _link(
    56.3 * GB,
    10e-6,
    ("measured", "estimated"),
    "RTX 5090, pinned memory, nvbandwidth (github.com/tinygrad/open-gpu-kernel-modules/issues/29)",
)
_PCIE_5_H200 = _link(
    52 * GB,
    10e-6,
    ("measured", "estimated"),
    "H200, pinned memory, copies in flight, JAX; a single 12.6 MB copy at a time gets 24 GB/s",
)
_SPECMD = _link(
    5 * GB,
    0.0,
    ("nominal", "estimated"),
    "the software-limited link of SpecMD (arXiv:2602.03921); its 1-2.4 ms of software overhead an expert is left out",
)
_INFINITE = _link(math.inf, 0.0, ("estimated", "estimated"), "costs nothing")

# Devices. Peaks are dense 16-bit matrix products with float32 sums. What is launched takes a time of its own in each
# layer, and none for an expert: 42 us fit the resident tokens per second of Qwen3-30B-A3B on an RTX PRO 6000 (177.8;
# github.com/harshithkantamneni/moe-speed-of-light, speed_limit_v2_outcome.md), 39 us those of imp on an RTX 5090
# (311.2; github.com/kekzl/imp/issues/1365). Where a memory's rate was inferred together with launches, both stay.
LAYER_S = 42e-6
_PHONE = _device(
    0.2 * TFLOP,
    12.5 * GB,
    20e-6,
    ("estimated", "estimated", "estimated"),
    "4 phone cores; memory rate inferred from 6.2 resident tokens/s of Qwen3-30B-A3B Q4_K_M "
    "(BigMoeOnEdge, benchmarks.md)",
)
_M5_MAX = _device(
    70 * TFLOP,
    614 * GB,
    0.0,
    ("estimated", "nominal", "estimated"),
    "Apple M5 Max, 40 GPU cores, unified memory",
    LAYER_S,
)
_RTX_3090 = _device(
    71 * TFLOP, 936 * GB, 0.0, ("nominal", "nominal", "estimated"), "NVIDIA GA102 white paper, RTX 3090", LAYER_S
)
_RTX_4090 = _device(
    165 * TFLOP,
    921 * GB,
    0.0,
    ("nominal", "measured", "estimated"),
    "NVIDIA Ada white paper, RTX 4090; memory by clpeak, 1008 GB/s nominal (github.com/krrishnarraj/clpeak/issues/106)",
    LAYER_S,
)
_RTX_4090_NO_LAUNCH = _Part(
    {**_RTX_4090.values, "layer_s": 0.0}, _RTX_4090.evidence, f"{_RTX_4090.source}; launches cost nothing"
)
_RTX_5090 = _device(
    209 * TFLOP, 1792 * GB, 0.0, ("nominal", "nominal", "estimated"), "NVIDIA Blackwell white paper, RTX 5090", LAYER_S
)
_A100_PCIE = _device(
    312 * TFLOP,
    1727 * GB,
    0.0,
    ("nominal", "measured", "estimated"),
    "NVIDIA A100 80GB PCIe data sheet; memory of an A800 80GB PCIe, 1935 GB/s nominal "
    "(github.com/mli/transformers-benchmarks/issues/4)",
    LAYER_S,
)
_H100 = _device(
    989 * TFLOP, 3350 * GB, 0.0, ("nominal", "nominal", "estimated"), "NVIDIA H100 data sheet, SXM5 80 GB", LAYER_S
)
_H200 = _device(
    989 * TFLOP,
    4300 * GB,
    25e-6,
    ("nominal", "measured", "estimated"),
    "NVIDIA H200 data sheet; memory by copies in JAX, 4800 GB/s nominal; launch inferred from 128 resident OLMoE "
    "experts in 3.6 ms in one jit",
)

# Hosts. Expert kernels reach about three quarters of what memory does; a hand-over is two small copies.
_NO_HOST = _host(
    0.2 * TFLOP,
    12.5 * GB,
    ("estimated", "estimated"),
    "the device is the host: an expert on the CPU costs what it costs there",
    moe_share=1.0,
    handover_s=0.0,
)
_UNIFIED = _host(1 * TFLOP, 250 * GB, ("estimated", "estimated"), "Apple M5 Max cores, unified memory")
_DESKTOP = _host(
    1 * TFLOP,
    65 * GB,
    ("estimated", "estimated"),
    "16 cores, two channels of DDR5-5600, three quarters of 89.6 GB/s; experts on the CPU read at the median of ten "
    "desktops, 24.6 to 93 GB/s (github.com/harshithkantamneni/moe-speed-of-light, prereg/panel_099.json)",
    moe_share=48.5 / 65,
    moe="measured",
)
_SERVER = _host(
    3.4 * TFLOP,
    230 * GB,
    ("measured", "estimated"),
    "32-core Threadripper PRO 7975WX, float32 products (github.com/chsasank/device-benchmarks/issues/14); "
    "eight channels of DDR5-4800, three quarters of 307 GB/s",
)


def _like(base: _Part, source: str, **numbers: tuple[float, Evidence]) -> _Part:
    """Gives a part with some numbers of another one replaced, each with how it is known."""
    values = {name: numbers[name][0] if name in numbers else value for name, value in base.values.items()}
    known = zip(base.values, base.evidence, strict=True)
    return _Part(values, tuple(numbers[name][1] if name in numbers else kind for name, kind in known), source)


def _other(
    flops: tuple[float, Evidence], memory: tuple[float, Evidence], source: str, base: _Part = _RTX_5090
) -> _Part:
    """A device whose launches are those of another one."""
    return _like(base, f"device: {source}", peak_flops_per_s=flops, memory_bytes_per_s=memory)


# More links, devices and hosts.
_PCIE_5_DESKTOP = _link(
    48.9 * GB,
    10e-6,
    ("measured", "estimated"),
    "RTX 5090, host memory as a kernel reads it, 45.7 to 48.9 GB/s in four desktops, 19 to 28.4 in five whose slot is "
    "slower (github.com/harshithkantamneni/moe-speed-of-light, prereg/panel_099.json)",
)
_PCIE_5_X8 = _link(25 * GB, 10e-6, ("estimated", "estimated"), "PCIe 5.0 x8, as much as PCIe 4.0 x16")
_R9700_LINK = _link(
    28 * GB,
    10e-6,
    ("measured", "estimated"),
    "R9700, host memory as a kernel reads it (github.com/davetha/r9700-lru-expert-cache)",
)
_MI210_LINK = _link(
    27 * GB,
    10e-6,
    ("measured", "estimated"),
    "MI210, host memory as a kernel reads it (github.com/davetha/vllm-expert-cache)",
)
_M5_PRO_SSD = _link(
    17.3 * GB, 122e-6, ("measured", "estimated"), "M5 Pro, reads of experts (github.com/carloslfu/slotstream/issues/23)"
)
_M4_MAX_SSD = _link(
    5.2 * GB,
    122e-6,
    ("estimated", "estimated"),
    "M4 Max, reads of 4.5 MiB, by a figure without its log (github.com/antirez/ds4/issues/1057)",
)
_RTX_5090_READ = _like(
    _RTX_5090,
    f"{_RTX_5090.source}; memory as a kernel reads it, 1688 to 1697 GB/s on 9 of 10 cards, 1792 nominal "
    "(github.com/harshithkantamneni/moe-speed-of-light, prereg/panel_099.json)",
    memory_bytes_per_s=(1692 * GB, "measured"),
)
_M5_MAX_READ = _like(
    _M5_MAX,
    f"{_M5_MAX.source}; memory as products of a matrix and a vector read it, 614 GB/s nominal "
    "(github.com/lablup/mlxcel/pull/358)",
    memory_bytes_per_s=(478 * GB, "measured"),
)
_RTX_PRO_6000 = _other(
    (368 * TFLOP, "measured"),
    (1604 * GB, "measured"),
    "RTX PRO 6000 Blackwell, bf16 products (github.com/zzc0721/torch-performance-test-data/issues/160); memory by "
    "p2pBandwidthLatencyTest, 1792 GB/s nominal (github.com/ikawrakow/ik_llama.cpp/pull/1022)",
)
_RTX_5060_TI = _other(
    (47 * TFLOP, "estimated"),
    (448 * GB, "nominal"),
    "RTX 5060 Ti, twice its float32 rate; 28 Gbit/s on 128 bits (github.com/Andyyyy64/whichllm/pull/33)",
)
_RTX_5070 = _other(
    (62 * TFLOP, "estimated"), (672 * GB, "nominal"), "RTX 5070, twice its float32 rate; 28 Gbit/s on 192 bits"
)
_GB10 = _other(
    (62.5 * TFLOP, "nominal"),
    (208 * GB, "measured"),
    "NVIDIA GB10; memory as products of a matrix and a vector read it, 201 to 214 GB/s, 273 nominal "
    "(github.com/lablup/mlxcel/pull/684)",
)
_STRIX_HALO = _other(
    (59.4 * TFLOP, "nominal"),
    (215 * GB, "measured"),
    "AMD Ryzen AI Max+ 395, 40 compute units; 256 GB/s nominal (whylucian.github.io/softab/docs/hardware-specs.html)",
)
_R9700 = _other(
    (191 * TFLOP, "nominal"),
    (640 * GB, "nominal"),
    "AMD Radeon AI PRO R9700 data sheet, not checked; 20 Gbit/s on 256 bits "
    "(github.com/datawhalechina/hello-gpu/issues/8)",
)
_MI210 = _other((181 * TFLOP, "nominal"), (1638 * GB, "nominal"), "AMD Instinct MI210 data sheet, not checked")
_M4_MAX = _other(
    (34.1 * TFLOP, "nominal"),
    (546 * GB, "nominal"),
    "Apple M4 Max, 40 GPU cores (whylucian.github.io/softab/docs/hardware-specs.html); 410 GB/s with 32",
    _M5_MAX,
)
_M3_ULTRA = _other(
    (57 * TFLOP, "estimated"), (819 * GB, "nominal"), "Apple M3 Ultra, 80 GPU cores, unified memory", _M5_MAX
)
_M5_PRO = _other(
    (35 * TFLOP, "estimated"), (307 * GB, "nominal"), "Apple M5 Pro, 20 GPU cores, unified memory", _M5_MAX
)
_UNIFIED_HALF = _host(
    1 * TFLOP, 120 * GB, ("estimated", "estimated"), "16 to 20 cores, about half of the unified memory's rate"
)

_PARTS: dict[str, tuple[_Part, _Part, _Part]] = {
    "phone-ufs": (_UFS_4, _PHONE, _NO_HOST),
    "apple-m3-ultra-ssd": (_M4_MAX_SSD, _M3_ULTRA, _UNIFIED),
    "apple-m4-max-ssd": (_M4_MAX_SSD, _M4_MAX, _UNIFIED),
    "apple-m5-max-ssd": (_APPLE_SSD, _M5_MAX_READ, _UNIFIED),
    "apple-m5-pro-ssd": (_M5_PRO_SSD, _M5_PRO, _UNIFIED_HALF),
    "gb10-nvme-4": (_NVME_4, _GB10, _UNIFIED_HALF),
    "strix-halo-nvme-4": (_NVME_4, _STRIX_HALO, _UNIFIED_HALF),
    # a link alone: an RTX 4090 in a desktop stands behind it
    "nvme-4": (_NVME_4, _RTX_4090, _DESKTOP),
    "nvme-5": (_NVME_5, _RTX_4090, _DESKTOP),
    "pcie3-x16": (_PCIE_3, _RTX_4090, _DESKTOP),
    "pcie4-x16": (_PCIE_4, _RTX_4090, _DESKTOP),
    "pcie5-x16": (_PCIE_5, _RTX_4090, _DESKTOP),
    "infinite": (_INFINITE, _RTX_4090_NO_LAUNCH, _DESKTOP),
    "rtx3090": (_PCIE_4, _RTX_3090, _DESKTOP),
    "rtx4090": (_PCIE_4_ADA, _RTX_4090, _DESKTOP),
    "rtx5060ti": (_PCIE_5_X8, _RTX_5060_TI, _DESKTOP),
    "rtx5070": (_PCIE_5_DESKTOP, _RTX_5070, _DESKTOP),
    "rtx5090": (_PCIE_5_DESKTOP, _RTX_5090_READ, _DESKTOP),
    "rtx-pro-6000": (_PCIE_5, _RTX_PRO_6000, _DESKTOP),
    "r9700": (_R9700_LINK, _R9700, _SERVER),
    "mi210": (_MI210_LINK, _MI210, _SERVER),
    "specmd-a100": (_SPECMD, _A100_PCIE, _SERVER),
    "a100-80gb-pcie4": (_PCIE_4, _A100_PCIE, _SERVER),
    "h100-pcie5": (_PCIE_5, _H100, _SERVER),
    "h200-pcie5": (_PCIE_5_H200, _H200, _SERVER),
}


_ENGINE = _Part(
    {"sync_s": 0.0, "overlaps": 1.0}, ("estimated", "estimated"), "engine: waits for nothing that is not asked for"
)


def _compose(parts: tuple[_Part, ...]) -> tuple[Hardware, HardwareNotes]:
    parts = (*parts, _ENGINE)
    values = {name: value for part in parts for name, value in part.values.items()}
    evidence: dict[str, Evidence] = {
        name: kind for part in parts for name, kind in zip(part.values, part.evidence, strict=True)
    }
    return Hardware(**values), HardwareNotes("; ".join(part.source for part in parts), evidence)


HARDWARE: dict[str, Hardware] = {name: _compose(parts)[0] for name, parts in _PARTS.items()}
HARDWARE_NOTES: dict[str, HardwareNotes] = {name: _compose(parts)[1] for name, parts in _PARTS.items()}
