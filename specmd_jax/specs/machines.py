"""`HARDWARE`: machines by name, each composed of a link, a device and a host, and where their numbers come from."""

from __future__ import annotations

from specmd_jax.specs import parts
from specmd_jax.specs.machine import Evidence, Hardware, HardwareNotes
from specmd_jax.specs.parts import Part

COMPOSED: dict[str, tuple[Part, Part, Part]] = {
    "phone-ufs": (parts.UFS_4, parts.PHONE, parts.NO_HOST),
    "apple-m3-ultra-ssd": (parts.M4_MAX_SSD, parts.M3_ULTRA, parts.UNIFIED),
    "apple-m4-max-ssd": (parts.M4_MAX_SSD, parts.M4_MAX, parts.UNIFIED),
    "apple-m5-max-ssd": (parts.APPLE_SSD, parts.M5_MAX_READ, parts.UNIFIED),
    "apple-m5-pro-ssd": (parts.M5_PRO_SSD, parts.M5_PRO, parts.UNIFIED_HALF),
    "gb10-nvme-4": (parts.NVME_4, parts.GB10, parts.UNIFIED_HALF),
    "strix-halo-nvme-4": (parts.NVME_4, parts.STRIX_HALO, parts.UNIFIED_HALF),
    # a link alone: an RTX 4090 in a desktop stands behind it
    "nvme-4": (parts.NVME_4, parts.RTX_4090, parts.DESKTOP),
    "nvme-5": (parts.NVME_5, parts.RTX_4090, parts.DESKTOP),
    "pcie3-x16": (parts.PCIE_3, parts.RTX_4090, parts.DESKTOP),
    "pcie4-x16": (parts.PCIE_4, parts.RTX_4090, parts.DESKTOP),
    "pcie5-x16": (parts.PCIE_5, parts.RTX_4090, parts.DESKTOP),
    "infinite": (parts.INFINITE, parts.RTX_4090_NO_LAUNCH, parts.DESKTOP),
    "rtx3090": (parts.PCIE_4, parts.RTX_3090, parts.DESKTOP),
    "rtx4090": (parts.PCIE_4_ADA, parts.RTX_4090, parts.DESKTOP),
    "rtx5060ti": (parts.PCIE_5_X8, parts.RTX_5060_TI, parts.DESKTOP),
    "rtx5070": (parts.PCIE_5_DESKTOP, parts.RTX_5070, parts.DESKTOP),
    "rtx5090": (parts.PCIE_5_DESKTOP, parts.RTX_5090_READ, parts.DESKTOP),
    "rtx-pro-6000": (parts.PCIE_5, parts.RTX_PRO_6000, parts.DESKTOP),
    "r9700": (parts.R9700_LINK, parts.R9700, parts.SERVER),
    "mi210": (parts.MI210_LINK, parts.MI210, parts.SERVER),
    "specmd-a100": (parts.SPECMD, parts.A100_PCIE, parts.SERVER),
    "a100-80gb-pcie4": (parts.PCIE_4, parts.A100_PCIE, parts.SERVER),
    "h100-pcie5": (parts.PCIE_5, parts.H100, parts.SERVER),
    "h200-pcie5": (parts.PCIE_5_H200, parts.H200, parts.SERVER),
}


_ENGINE = Part(
    {"sync_s": 0.0, "overlaps": 1.0}, ("estimated", "estimated"), "engine: waits for nothing that is not asked for"
)


def _compose(found: tuple[Part, ...]) -> tuple[Hardware, HardwareNotes]:
    found = (*found, _ENGINE)
    values = {name: value for part in found for name, value in part.values.items()}
    evidence: dict[str, Evidence] = {
        name: kind for part in found for name, kind in zip(part.values, part.evidence, strict=True)
    }
    return Hardware(**values), HardwareNotes("; ".join(part.source for part in found), evidence)


HARDWARE: dict[str, Hardware] = {name: _compose(parts)[0] for name, parts in COMPOSED.items()}
HARDWARE_NOTES: dict[str, HardwareNotes] = {name: _compose(parts)[1] for name, parts in COMPOSED.items()}
