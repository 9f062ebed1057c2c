"""Settings of host memory in front of storage, for every study that has them (CONTRACT.md section 6)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from configs.options import EVICTIONS, HARDWARE, SCOPES, Names, Setting, capacity, machine
from specmd_jax.errors import SpecmdError

HEARS = Names("host_hears", "specmd_jax.setting", "HEARS")
INCLUSION = Names("inclusion", "specmd_jax.setting", "INCLUSION")
PREFETCH_TO = Names("prefetch_to", "specmd_jax.setting", "PREFETCH_TO")


@dataclass(frozen=True)
class HostMemory:
    """Fields of `specmd_jax.Setting`, by the same names."""

    host_capacity: str | None = None
    host_scope: str = "global"
    host_eviction: str = "lru"
    host_hears: str = "misses"
    inclusion: str = "inclusive"
    storage: str | None = None
    prefetch_to: str = "device"

    def check(self) -> None:
        """Raises `SpecmdError` for settings of host memory where it holds everything."""
        for name, value in asdict(self).items():
            if self.host_capacity is None and value != getattr(HostMemory(), name):
                raise SpecmdError(f"{name} is {value!r} without a host_capacity, expected one, such as '64GiB'")

    def check_with(self, hardware: str | None) -> None:
        """Raises `SpecmdError` where a machine does not go with them."""
        if self.host_capacity is not None:
            from specmd_jax.setting import make_setting  # brings JAX

            make_setting(hardware=hardware, **self.fields)

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of `specmd_jax.Setting`."""
        return asdict(self)


HOST_OPTIONS = {
    "host_capacity": Setting(
        "how much of host memory is for experts, such as 64GiB; the rest is read from storage",
        check=capacity,
        shown="all of them",
        metavar="SIZE",
    ),
    "host_scope": Setting("of host memory, global: one pool; layer: one pool per layer", names=SCOPES),
    "host_eviction": Setting("eviction policy of host memory", names=EVICTIONS),
    "host_hears": Setting("what it hears: the device's misses, or all uses", names=HEARS),
    "inclusion": Setting("inclusive: what is copied stays in host memory; exclusive: it moves", names=INCLUSION),
    "storage": Setting(
        "the storage behind host memory: a machine whose link it is",
        names=HARDWARE,
        check=machine,
        shown="as the hardware says",
    ),
    "prefetch_to": Setting("device: what is foreseen is copied to it; host: read into host memory", names=PREFETCH_TO),
}
