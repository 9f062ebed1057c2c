"""Links, devices and hosts, of which `machines` composes its presets. The only place that speaks of GB/s.

Each number is ``measured`` by somebody, ``nominal`` (a data sheet) or ``estimated``, and each part names its source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from specmd_jax.specs.machine import Evidence
from specmd_jax.units import GB, MIB

TFLOP = 1e12


@dataclass(frozen=True)
class Part:
    """A link, a device or a host: some fields of `Hardware`, how each is known, and the source."""

    values: Mapping[str, float]
    evidence: tuple[Evidence, ...]  # in the order of `values`
    source: str


def link(bytes_per_s: float, latency_s: float, evidence: tuple[Evidence, Evidence], source: str) -> Part:
    return Part({"link_bytes_per_s": bytes_per_s, "link_latency_s": latency_s}, evidence, f"link: {source}")


def device(
    flops_per_s: float,
    bytes_per_s: float,
    launch_s: float,
    evidence: tuple[Evidence, Evidence, Evidence],
    source: str,
    layer_s: float = 0.0,
) -> Part:
    """`evidence` of the peak, of memory, and of what is launched."""
    values = {"peak_flops_per_s": flops_per_s, "memory_bytes_per_s": bytes_per_s, "launch_s": launch_s}
    return Part(values | {"layer_s": layer_s}, (*evidence, evidence[-1]), f"device: {source}")


def host(
    flops_per_s: float,
    bytes_per_s: float,
    evidence: tuple[Evidence, Evidence],
    source: str,
    moe_share: float = 0.75,
    handover_s: float = 20e-6,
    moe: Evidence = "estimated",
) -> Part:
    """`moe_share`: of the memory's rate that expert kernels reach, and how that is known."""
    values = {"host_flops_per_s": flops_per_s, "host_bytes_per_s": bytes_per_s}
    values |= {"host_moe_bytes_per_s": moe_share * bytes_per_s, "handover_s": handover_s}
    return Part(values, (*evidence, moe, "estimated"), f"host: {source}")


# Links. Sustained rates as a program sees them, not the signalling rate of the bus.
UFS_4 = link(
    2460.0 * MIB,
    100e-6,
    ("measured", "estimated"),
    "UFS 4 of a OnePlus 15R, ceiling of random uncached reads when cold, 1645 MiB/s when hot "
    "(BigMoeOnEdge, iobench-ceiling.md)",
)
NVME_4 = link(
    6.4 * GB,
    100e-6,
    ("measured", "estimated"),
    "Phison E27T, PCIe 4.0 x4, uncached reads of 18 MiB (github.com/0xBakeer/deepseek-v41-flash-spark/issues/2)",
)
NVME_5 = link(
    10.7 * GB,
    100e-6,
    ("measured", "estimated"),
    "Samsung 9100 PRO, PCIe 5.0 x4, uncached reads of 19 MB by 8 threads (github.com/JustVugg/colibri/issues/65)",
)
APPLE_SSD = link(
    11.1 * GB,
    122e-6,
    ("measured", "measured"),
    "M5 Max, uncached random reads of 9.3 MiB one at a time, by 9 threads 14.1 GB/s "
    "(github.com/antirez/ds4/issues/491), latency of a small read (github.com/ml-explore/mlx-lm/issues/1438)",
)
PCIE_3 = link(
    12.2 * GB,
    10e-6,
    ("measured", "estimated"),
    "P100 PCIe, pinned memory, bandwidthTest (github.com/mpicbg-scicomp/gearshifft/pull/82)",
)
PCIE_4 = link(
    25.1 * GB,
    10e-6,
    ("measured", "estimated"),
    "A100, pinned memory, nvbandwidth (github.com/NVIDIA/nvbandwidth/issues/42)",
)
PCIE_4_ADA = link(
    26.3 * GB,
    10e-6,
    ("measured", "estimated"),
    "RTX 4090, pinned memory, nvbandwidth (github.com/NVIDIA/nvbandwidth/issues/15)",
)
PCIE_5 = link(
    56.3 * GB,
    10e-6,
    ("measured", "estimated"),
    "RTX 5090, pinned memory, nvbandwidth (github.com/tinygrad/open-gpu-kernel-modules/issues/29)",
)
PCIE_5_H200 = link(
    52 * GB,
    10e-6,
    ("measured", "estimated"),
    "H200, pinned memory, copies in flight, JAX; a single 12.6 MB copy at a time gets 24 GB/s",
)
SPECMD = link(
    5 * GB,
    0.0,
    ("nominal", "estimated"),
    "the software-limited link of SpecMD (arXiv:2602.03921); its 1-2.4 ms of software overhead an expert is left out",
)
INFINITE = link(math.inf, 0.0, ("estimated", "estimated"), "costs nothing")

# Devices. Peaks are dense 16-bit matrix products with float32 sums. What is launched takes a time of its own in each
# layer, and none for an expert: 42 us fit the resident tokens per second of Qwen3-30B-A3B on an RTX PRO 6000 (177.8;
# github.com/harshithkantamneni/moe-speed-of-light, speed_limit_v2_outcome.md), 39 us those of imp on an RTX 5090
# (311.2; github.com/kekzl/imp/issues/1365). Where a memory's rate was inferred together with launches, both stay.
LAYER_S = 42e-6
PHONE = device(
    0.2 * TFLOP,
    12.5 * GB,
    20e-6,
    ("estimated", "estimated", "estimated"),
    "4 phone cores; memory rate inferred from 6.2 resident tokens/s of Qwen3-30B-A3B Q4_K_M "
    "(BigMoeOnEdge, benchmarks.md)",
)
M5_MAX = device(
    70 * TFLOP,
    614 * GB,
    0.0,
    ("estimated", "nominal", "estimated"),
    "Apple M5 Max, 40 GPU cores, unified memory",
    LAYER_S,
)
RTX_3090 = device(
    71 * TFLOP, 936 * GB, 0.0, ("nominal", "nominal", "estimated"), "NVIDIA GA102 white paper, RTX 3090", LAYER_S
)
RTX_4090 = device(
    165 * TFLOP,
    921 * GB,
    0.0,
    ("nominal", "measured", "estimated"),
    "NVIDIA Ada white paper, RTX 4090; memory by clpeak, 1008 GB/s nominal (github.com/krrishnarraj/clpeak/issues/106)",
    LAYER_S,
)
RTX_4090_NO_LAUNCH = Part(
    {**RTX_4090.values, "layer_s": 0.0}, RTX_4090.evidence, f"{RTX_4090.source}; launches cost nothing"
)
RTX_5090 = device(
    209 * TFLOP, 1792 * GB, 0.0, ("nominal", "nominal", "estimated"), "NVIDIA Blackwell white paper, RTX 5090", LAYER_S
)
A100_PCIE = device(
    312 * TFLOP,
    1727 * GB,
    0.0,
    ("nominal", "measured", "estimated"),
    "NVIDIA A100 80GB PCIe data sheet; memory of an A800 80GB PCIe, 1935 GB/s nominal "
    "(github.com/mli/transformers-benchmarks/issues/4)",
    LAYER_S,
)
H100 = device(
    989 * TFLOP, 3350 * GB, 0.0, ("nominal", "nominal", "estimated"), "NVIDIA H100 data sheet, SXM5 80 GB", LAYER_S
)
H200 = device(
    989 * TFLOP,
    4300 * GB,
    25e-6,
    ("nominal", "measured", "estimated"),
    "NVIDIA H200 data sheet; memory by copies in JAX, 4800 GB/s nominal; launch inferred from 128 resident OLMoE "
    "experts in 3.6 ms in one jit",
)

# Hosts. Expert kernels reach about three quarters of what memory does; a hand-over is two small copies.
NO_HOST = host(
    0.2 * TFLOP,
    12.5 * GB,
    ("estimated", "estimated"),
    "the device is the host: an expert on the CPU costs what it costs there",
    moe_share=1.0,
    handover_s=0.0,
)
UNIFIED = host(1 * TFLOP, 250 * GB, ("estimated", "estimated"), "Apple M5 Max cores, unified memory")
DESKTOP = host(
    1 * TFLOP,
    65 * GB,
    ("estimated", "estimated"),
    "16 cores, two channels of DDR5-5600, three quarters of 89.6 GB/s; experts on the CPU read at the median of ten "
    "desktops, 24.6 to 93 GB/s (github.com/harshithkantamneni/moe-speed-of-light, prereg/panel_099.json)",
    moe_share=48.5 / 65,
    moe="measured",
)
SERVER = host(
    3.4 * TFLOP,
    230 * GB,
    ("measured", "estimated"),
    "32-core Threadripper PRO 7975WX, float32 products (github.com/chsasank/device-benchmarks/issues/14); "
    "eight channels of DDR5-4800, three quarters of 307 GB/s",
)


def like(base: Part, source: str, **numbers: tuple[float, Evidence]) -> Part:
    """Gives a part with some numbers of another one replaced, each with how it is known."""
    values = {name: numbers[name][0] if name in numbers else value for name, value in base.values.items()}
    known = zip(base.values, base.evidence, strict=True)
    return Part(values, tuple(numbers[name][1] if name in numbers else kind for name, kind in known), source)


def other(flops: tuple[float, Evidence], memory: tuple[float, Evidence], source: str, base: Part = RTX_5090) -> Part:
    """A device whose launches are those of another one."""
    return like(base, f"device: {source}", peak_flops_per_s=flops, memory_bytes_per_s=memory)


# More links, devices and hosts.
PCIE_5_DESKTOP = link(
    48.9 * GB,
    10e-6,
    ("measured", "estimated"),
    "RTX 5090, host memory as a kernel reads it, 45.7 to 48.9 GB/s in four desktops, 19 to 28.4 in five whose slot is "
    "slower (github.com/harshithkantamneni/moe-speed-of-light, prereg/panel_099.json)",
)
PCIE_5_X8 = link(25 * GB, 10e-6, ("estimated", "estimated"), "PCIe 5.0 x8, as much as PCIe 4.0 x16")
R9700_LINK = link(
    28 * GB,
    10e-6,
    ("measured", "estimated"),
    "R9700, host memory as a kernel reads it (github.com/davetha/r9700-lru-expert-cache)",
)
MI210_LINK = link(
    27 * GB,
    10e-6,
    ("measured", "estimated"),
    "MI210, host memory as a kernel reads it (github.com/davetha/vllm-expert-cache)",
)
M5_PRO_SSD = link(
    17.3 * GB, 122e-6, ("measured", "estimated"), "M5 Pro, reads of experts (github.com/carloslfu/slotstream/issues/23)"
)
M4_MAX_SSD = link(
    5.2 * GB,
    122e-6,
    ("estimated", "estimated"),
    "M4 Max, reads of 4.5 MiB, by a figure without its log (github.com/antirez/ds4/issues/1057)",
)
RTX_5090_READ = like(
    RTX_5090,
    f"{RTX_5090.source}; memory as a kernel reads it, 1688 to 1697 GB/s on 9 of 10 cards, 1792 nominal "
    "(github.com/harshithkantamneni/moe-speed-of-light, prereg/panel_099.json)",
    memory_bytes_per_s=(1692 * GB, "measured"),
)
M5_MAX_READ = like(
    M5_MAX,
    f"{M5_MAX.source}; memory as products of a matrix and a vector read it, 614 GB/s nominal "
    "(github.com/lablup/mlxcel/pull/358)",
    memory_bytes_per_s=(478 * GB, "measured"),
)
RTX_PRO_6000 = other(
    (368 * TFLOP, "measured"),
    (1604 * GB, "measured"),
    "RTX PRO 6000 Blackwell, bf16 products (github.com/zzc0721/torch-performance-test-data/issues/160); memory by "
    "p2pBandwidthLatencyTest, 1792 GB/s nominal (github.com/ikawrakow/ik_llama.cpp/pull/1022)",
)
RTX_5060_TI = other(
    (47 * TFLOP, "estimated"),
    (448 * GB, "nominal"),
    "RTX 5060 Ti, twice its float32 rate; 28 Gbit/s on 128 bits (github.com/Andyyyy64/whichllm/pull/33)",
)
RTX_5070 = other(
    (62 * TFLOP, "estimated"), (672 * GB, "nominal"), "RTX 5070, twice its float32 rate; 28 Gbit/s on 192 bits"
)
GB10 = other(
    (62.5 * TFLOP, "nominal"),
    (208 * GB, "measured"),
    "NVIDIA GB10; memory as products of a matrix and a vector read it, 201 to 214 GB/s, 273 nominal "
    "(github.com/lablup/mlxcel/pull/684)",
)
STRIX_HALO = other(
    (59.4 * TFLOP, "nominal"),
    (215 * GB, "measured"),
    "AMD Ryzen AI Max+ 395, 40 compute units; 256 GB/s nominal (whylucian.github.io/softab/docs/hardware-specs.html)",
)
R9700 = other(
    (191 * TFLOP, "nominal"),
    (640 * GB, "nominal"),
    "AMD Radeon AI PRO R9700 data sheet, not checked; 20 Gbit/s on 256 bits "
    "(github.com/datawhalechina/hello-gpu/issues/8)",
)
MI210 = other((181 * TFLOP, "nominal"), (1638 * GB, "nominal"), "AMD Instinct MI210 data sheet, not checked")
M4_MAX = other(
    (34.1 * TFLOP, "nominal"),
    (546 * GB, "nominal"),
    "Apple M4 Max, 40 GPU cores (whylucian.github.io/softab/docs/hardware-specs.html); 410 GB/s with 32",
    M5_MAX,
)
M3_ULTRA = other(
    (57 * TFLOP, "estimated"), (819 * GB, "nominal"), "Apple M3 Ultra, 80 GPU cores, unified memory", M5_MAX
)
M5_PRO = other((35 * TFLOP, "estimated"), (307 * GB, "nominal"), "Apple M5 Pro, 20 GPU cores, unified memory", M5_MAX)
UNIFIED_HALF = host(
    1 * TFLOP, 120 * GB, ("estimated", "estimated"), "16 to 20 cores, about half of the unified memory's rate"
)
