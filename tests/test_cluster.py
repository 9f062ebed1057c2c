"""A sweep by several processes writes what one process writes, byte for byte, and goes on after a lost one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.cluster import add_options, join
from experiments.common.command_line import parser
from specmd_jax.engines.devices import devices, replay_spread
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.errors import SpecmdError
from specmd_jax.setting import Setting
from specmd_jax.specs.hardware import hardware
from specmd_jax.trace import bundled, first_tokens

ROOT = Path(__file__).parents[1]
TIMED = ("--tokens=30", "--evictions=least_stale", "--capacities=5", "--hardware=pcie4-x16,phone-ufs")
CURVES = ("--tokens=100", "--evictions=slru,belady", "--capacities=11")


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "experiments.sweep", "--out", "out", *options]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def start_two(folder: Path, *options: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{probe.getsockname()[1]}"
    together = ("--cpu-devices=4", coordinator, "--num-processes=2")
    return [start(folder, *options, *together, f"--process-id={number}") for number in range(2)]


def end(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("options", [TIMED, CURVES], ids=["timed", "curves"])
def test_two_processes_of_four_devices_write_what_one_writes(tmp_path: Path, options: tuple[str, ...]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    for process in start_two(two, *options):
        end(process)
    end(start(one, *options, "--cpu-devices=1"))
    assert (one / "out" / "rows.csv").read_bytes() == (two / "out" / "rows.csv").read_bytes()


@pytest.mark.slow
def test_a_lost_process_costs_no_rows(tmp_path: Path) -> None:
    rows = tmp_path / "out" / "rows.csv"
    options = ("--tokens=30", "--evictions=lru,fifo", "--capacities=2", "--hardware=pcie4-x16")
    processes = start_two(tmp_path, *options)
    until = time.monotonic() + 200
    while not rows.exists() or rows.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    for process in reversed(processes):
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = rows.read_bytes()
    end(start(tmp_path, *options))
    whole = rows.read_bytes()
    assert whole.startswith(kept[: kept.rfind(b"\n") + 1]) and len(whole) > len(kept)
    cells = [line.split(b",")[:11] for line in whole.splitlines()[1:]]  # up to the capacity
    assert len(cells) == len({tuple(cell) for cell in cells}) == 2 * 7


def test_dealt_to_devices_a_cell_is_what_it_is_alone() -> None:
    """On as many devices as there are: this process' one, unless the environment gives it more."""
    trace = first_tokens(bundled("gpt-oss-20b"), 12)
    setting = Setting(eviction="lru", prefetch="transition")
    mix = setting.mix(trace.top_k)
    replays, machine = prepare(trace), hardware("pcie4-x16")
    setup = replays.setup(mix, machine, **setting.options)
    budgets = [Setting(capacity=size).budget(trace) for size in ("5%", "10%", "50%")]
    sizes = np.stack([replays.sizes.budget(budget) for budget in budgets])
    numbers = replays.numbers(budgets[0], machine)._replace(budget=jax.numpy.asarray(sizes))
    arguments = setup, ("budget",), numbers, mix.traced(), replays.visits(setup, mix)
    (_, wanted), _ = replay_many(*arguments)
    jax.tree.map(np.testing.assert_array_equal, replay_spread(*arguments, mesh=devices()), wanted)


def test_dealt_to_devices_a_program_counts_what_it_counts_alone() -> None:
    """The kernel's cells are dealt in another order, and come back in the first one."""
    script = """
        import jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 3)
        from specmd_jax.setting import Setting
        from specmd_jax.specs.hardware import hardware
        from specmd_jax.engines.prepared import prepare
        from specmd_jax.engines.devices import devices, replay_spread
        from specmd_jax.engines.gpu_columns import columns_of
        from specmd_jax.trace import synthesize
        trace = synthesize(layers=3, experts=8, top_k=2, tokens=10)
        mix, machine = Setting(eviction="lfu", prefetch="popular").mix(2), hardware("pcie4-x16")
        replays = prepare(trace)
        setup = replays.setup(mix, machine, **Setting().options)
        size = int(trace.expert_bytes[0])
        units = np.array([replays.sizes.budget(slots * size) for slots in (2, 3, 5, 7, 9, 11, 13)])
        numbers = replays.numbers(10**9, machine)._replace(budget=units)
        recorded = columns_of(replays, setup, mix.traced())
        alone, dealt = (
            replay_spread(setup, ("budget",), numbers, mix.traced(), recorded, mesh)
            for mesh in (jax.sharding.Mesh(np.array(jax.devices()[:1]), ("cells",)), devices())
        )
        assert devices().size == 3
        assert len(np.unique(alone.experts.fetched.sum(axis=-1))) == 7, alone.experts.fetched.sum(axis=-1)
        jax.tree.map(np.testing.assert_array_equal, alone, dealt)
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--coordinator=localhost:1",), "go together"),
        (("--coordinator=localhost:1", "--num-processes=2", "--process-id=2"), "--process-id 2: expected 0..1"),
        (("--cpu-devices=0",), "--cpu-devices 0: expected at least 1"),
    ],
)
def test_bad_options_are_told(options: tuple[str, ...], expected: str) -> None:
    command = parser(None, "sweep")
    add_options(command)
    with pytest.raises(SpecmdError, match=expected):
        join(command.parse_args(options))
