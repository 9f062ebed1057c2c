"""Options of a command that several processes run together, and the devices that one process takes.

Every process runs the same command; `join` makes them one JAX program. The first one reads and writes the files.
Options are added without JAX, which the rest imports.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

from specmd_jax.errors import SpecmdError

JOIN_TIMEOUT_S = 300
LOST_AFTER_S = 30  # a process that has not been heard of for so long is lost


def add_options(options: argparse.ArgumentParser) -> None:
    """Adds ``--cluster``, ``--coordinator``, ``--num-processes``, ``--process-id`` and ``--cpu-devices``."""
    group = options.add_argument_group("several processes (each runs the same command, the first writes the results)")
    group.add_argument(
        "--cluster", action="store_true", help="find the others through Slurm, Open MPI, GKE or Cloud TPU"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="or by hand: address at which the first process listens"
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")
    add_cpu_devices(group)


def add_cpu_devices(options: argparse._ActionsContainer) -> None:
    """Adds ``--cpu-devices``, for `split_cpu`."""
    options.add_argument(
        "--cpu-devices", type=int, metavar="N", help="JAX devices that a CPU is divided into (default: one per core)"
    )


def join(args: argparse.Namespace) -> bool:
    """Makes this process one of several, if the options say so. Returns whether it is the first.

    Raises `SpecmdError` for options that do not go together, or if the others do not come.
    """
    by_hand = [args.coordinator, args.num_processes, args.process_id]
    if any(value is not None for value in by_hand):
        if any(value is None for value in by_hand) or args.cluster:
            raise SpecmdError("--coordinator, --num-processes and --process-id go together, and without --cluster")
        if not 0 <= args.process_id < args.num_processes:
            raise SpecmdError(f"--process-id {args.process_id}: expected 0..{args.num_processes - 1}")
    split_cpu(args.cpu_devices)
    import jax

    if args.cluster or args.coordinator:
        try:
            jax.distributed.initialize(
                args.coordinator,
                args.num_processes,
                args.process_id,
                initialization_timeout=JOIN_TIMEOUT_S,
                heartbeat_timeout_seconds=LOST_AFTER_S,
            )
        except (RuntimeError, ValueError) as error:
            raise SpecmdError(f"the processes did not find each other: {str(error).splitlines()[0]}") from None
    return jax.process_index() == 0


def cores() -> int:
    """Says how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cpu(parts: int | None = None) -> None:
    """Divides the CPU into so many JAX devices of one thread each (None: one per core), unless JAX has begun.

    A visit is dozens of operations of some microseconds. XLA would split the larger ones over all cores, and handing
    them over takes longer than they do: with one thread per device, two devices on two cores replay three times as
    fast.

    Raises `SpecmdError` for less than one part.
    """
    if parts is not None and parts < 1:
        raise SpecmdError(f"--cpu-devices {parts}: expected at least 1")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    with contextlib.suppress(RuntimeError):  # JAX has already begun and keeps the devices it has
        jax.config.update("jax_num_cpu_devices", parts or cores())
        os.environ.setdefault("PJRT_NPROC", "1")


@contextlib.contextmanager
def one_line_if_lost() -> Iterator[None]:
    """Ends in one line what fails because another process is gone. (JAX itself aborts a process that only waits.)"""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        raise SpecmdError(f"another process ended or was lost; the same command continues ({reason})") from None
