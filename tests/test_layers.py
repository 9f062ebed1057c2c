"""Imports point one way: a room of `specmd_jax` may use the rooms below it, and nothing above."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up; rooms of one line are on the same floor and may use each other, but not in a circle.
FLOORS = (
    (
        "errors",
        "types",
        "units",
        "files",
        "inputs",
        "archives",
        "programs",
        "checkpoints",
        "loops",
        "progress",
        "safetensors",
        "training",
        "reference",
    ),
    ("specs",),
    ("trace",),
    ("policies",),
    ("schedule",),
    ("replay",),
    ("setting",),
    ("engines",),
    ("bounds", "soft", "timelines"),
    ("launches",),
    ("api",),
    ("learn", "moe"),
    ("__init__",),
    ("__main__",),
)
# The floors inside the rooms, from the bottom up; files of one line must not use each other at all.
MOE_FLOORS = (
    ("model",),
    ("checkpoint",),
    ("runtime",),
    ("kernels",),
    ("layerwise", "fused", "measure", "training"),
    ("__init__",),
)
INSIDE: dict[str, tuple[tuple[str, ...], ...]] = {
    "specs": (
        ("attention", "capacity", "machine", "reading"),
        ("engines", "parts"),
        ("machines",),
        ("hardware",),
        ("layers",),
        ("parameters",),
        ("published", "spec"),
        ("config_json", "record"),
        ("models",),
        ("memory",),
        ("__init__",),
    ),
    "trace": (
        ("locality", "select", "validate"),
        ("capture", "file", "filling", "measures", "synthetic"),
        ("bundled", "importers", "prompts", "stream"),
        ("door",),
        ("profile",),
        ("__init__",),
    ),
    "policies": (
        ("base", "features", "hashing", "numbers", "use_history"),
        ("adaptive", "admission", "columns", "miss", "online", "routing", "trained"),
        ("adaptive_prefetch", "by_score", "weighted"),
        ("adaptive_eviction", "learned_eviction", "prefetch"),
        ("eviction",),
        ("choice",),
        ("pins", "tuned"),
        ("__init__",),
    ),
    "schedule": (
        ("drafts",),
        ("passes",),
        ("build", "counted", "demand", "demand_kernels", "future"),
        ("export", "stretches"),
        ("__init__",),
    ),
    "replay": (
        ("make_room", "start", "timing", "totals"),
        ("sharing",),
        ("metrics", "state", "storage"),
        ("demand", "host_tier", "pinning", "serving"),
        ("prefetching", "routing", "spending"),
        ("reading_ahead",),
        ("host_room",),
        ("step",),
        ("__init__",),
    ),
    "engines": (
        ("asked", "curves_kernels", "gpu_visits", "offline_scores", "scan", "sizes", "visits"),
        ("prepared",),
        ("gpu_columns",),
        ("gpu_program",),
        ("gpu",),
        ("devices",),
        ("curves",),
        ("requests", "stream", "table"),
        ("__init__",),
    ),
    "bounds": (("kernels",), ("lines", "prices"), ("programs", "schedules"), ("stall",), ("__init__",)),
    "timelines": (
        ("host_memory", "parts", "sharing"),
        ("course", "sheet"),
        ("chrome", "loads"),
        ("drawing",),
        ("record",),
        ("residency",),
        ("__init__",),
    ),
    "soft": (("scores", "settings", "top_c"), ("visit",), ("replay",), ("search",), ("__init__",)),
    "learn": (
        ("kernels", "history_kernels", "splits", "stall", "threads"),
        ("examples",),
        ("controls", "evaluation", "predictor", "settings"),
        ("device", "host"),
        ("hidden", "training"),
        ("through_cache",),
        ("__init__",),
    ),
    "moe": MOE_FLOORS,
}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OUTSIDE = ("experiments", "configs", "tests")  # they use the library, never the other way round
REPORT_MAY_USE = {
    "numpy",
    "matplotlib",
    "pandas",  # where they are installed
    "pyarrow",
    "specmd_jax.errors",
    "specmd_jax.files",
    "specmd_jax.inputs",
    "specmd_jax.archives",
    "specmd_jax.units",
    "specmd_jax.report",
}


def _modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the library under `root`; a package goes by its own name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / "specmd_jax").rglob("*.py"))
    }


def _imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Dotted names that a module imports anywhere in its text; of ours, down to the module."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join(start + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base


def _room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def _floor(name: str) -> int:
    return FLOOR_OF.get(_room(name), len(FLOORS))


def upward_imports(root: Path) -> list[str]:
    """Every import against the arrow, as ``module imports module``."""
    modules = _modules(root)
    bad = []
    for name, path in modules.items():
        for used in _imports(name, path, modules):
            top = used.split(".")[0]
            if _room(name) == "report":
                ours = ".".join(used.split(".")[:2])
                fine = top in sys.stdlib_module_names or top in REPORT_MAY_USE or ours in REPORT_MAY_USE
            elif top == "specmd_jax":
                fine = _floor(used) <= _floor(name) and _room(used) != "report"
            else:
                fine = top not in OUTSIDE
            if not fine:
                bad.append(f"{name} imports {used}")
    return bad


def sideways_imports(root: Path, package: str, floors: Sequence[Sequence[str]]) -> list[str]:
    """Imports inside a package that do not point down: to a higher floor, or to another room of the same one."""
    modules = _modules(root)
    floor_of = {room: floor for floor, rooms in enumerate(floors) for room in rooms}

    def room(name: str) -> str:
        return (name.removeprefix(package).strip(".") or "__init__").split(".")[0]

    inside = {name: path for name, path in modules.items() if name == package or name.startswith(f"{package}.")}
    return [
        f"{name} imports {used}"
        for name, path in inside.items()
        for used in _imports(name, path, modules)
        if used in inside and room(used) != room(name) and floor_of[room(used)] >= floor_of[room(name)]
    ]


def import_circle(root: Path) -> list[str]:
    """Modules that import each other in a circle, or []."""
    modules = _modules(root)
    graph = {name: set(_imports(name, path, modules)) & modules.keys() - {name} for name, path in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_its_floor() -> None:
    rooms = {_room(name) for name in _modules(ROOT)} - {"report"}
    assert rooms <= FLOOR_OF.keys(), "a new room: give it a floor above"


def test_no_import_points_upwards() -> None:
    assert upward_imports(ROOT) == []


@pytest.mark.parametrize("room", INSIDE)
def test_inside_a_room_files_import_only_those_below(room: str) -> None:
    assert sideways_imports(ROOT, f"specmd_jax.{room}", INSIDE[room]) == []
    inside = {
        _room(name.removeprefix("specmd_jax.")) for name in _modules(ROOT) if name.startswith(f"specmd_jax.{room}")
    }
    assert inside == {name for floor in INSIDE[room] for name in floor}, "a new file: give it a floor above"


def test_no_modules_import_each_other() -> None:
    assert import_circle(ROOT) == []


def test_settings_do_not_import_studies() -> None:
    for path in sorted((ROOT / "configs").rglob("*.py")):
        used = {name.split(".")[0] for name in _imports(f"configs.{path.stem}", path, {})}
        assert not used & {"experiments", "tests"}, path


def test_only_the_report_draws() -> None:
    for folder in ("experiments", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            assert "matplotlib" not in {name.split(".")[0] for name in _imports(path.stem, path, {})}, path


def test_reports_are_drawn_without_jax() -> None:
    script = (
        "import sys, pkgutil, importlib\n"
        "sys.modules['jax'] = sys.modules['jaxlib'] = sys.modules['flax'] = None\n"  # importing one raises ImportError
        "import specmd_jax.report as report\n"
        "for module in pkgutil.walk_packages(report.__path__, 'specmd_jax.report.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("types.py", "from specmd_jax.replay.step import run", ["specmd_jax.types imports specmd_jax.replay.step"]),
        (
            "trace/file.py",
            "def f():\n  import specmd_jax.policies",
            ["specmd_jax.trace.file imports specmd_jax.policies"],
        ),
        ("policies/miss.py", "from ..sweep import run", ["specmd_jax.policies.miss imports specmd_jax.sweep"]),
        ("policies/miss.py", "from . import hashing", []),
        ("policies/miss.py", "from specmd_jax import api", ["specmd_jax.policies.miss imports specmd_jax.api"]),
        ("policies/miss.py", "import specmd_jax", ["specmd_jax.policies.miss imports specmd_jax"]),
        ("replay/metrics.py", "from experiments import sweep", ["specmd_jax.replay.metrics imports experiments"]),
        ("replay/metrics.py", "import jax, specmd_jax.types", []),
        ("sweep.py", "from specmd_jax.report import reader", ["specmd_jax.sweep imports specmd_jax.report.reader"]),
        ("report/studies.py", "import jax.numpy", ["specmd_jax.report.studies imports jax.numpy"]),
        ("report/studies.py", "from specmd_jax.types import X", ["specmd_jax.report.studies imports specmd_jax.types"]),
        ("report/studies.py", "import json, numpy.linalg\nfrom specmd_jax.report import reader", []),
    ],
)
def test_the_check_itself(tmp_path: Path, file: str, text: str, expected: list[str]) -> None:
    for known in ("__init__", "api", "policies/hashing", "report/reader"):
        path = tmp_path / "specmd_jax" / f"{known}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = tmp_path / "specmd_jax" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert upward_imports(tmp_path) == expected


def test_the_check_of_inner_rooms_itself(tmp_path: Path) -> None:
    texts = {
        "moe/__init__": "from specmd_jax.moe.fused import engine",
        "moe/model/layers": "import jax",
        "moe/layerwise/engine": "from specmd_jax.moe.model import layers\nfrom specmd_jax.moe.layerwise import visit",
        "moe/layerwise/visit": "from specmd_jax.moe.fused import engine",
        "moe/fused/engine": "import specmd_jax.errors",
        "moe/runtime/store": "from specmd_jax.moe.fused.engine import Fused",
    }
    for name, text in texts.items():
        path = tmp_path / "specmd_jax" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert sideways_imports(tmp_path, "specmd_jax.moe", MOE_FLOORS) == [
        "specmd_jax.moe.layerwise.visit imports specmd_jax.moe.fused.engine",
        "specmd_jax.moe.runtime.store imports specmd_jax.moe.fused.engine",
    ]


def test_the_check_for_circles_itself(tmp_path: Path) -> None:
    package = tmp_path / "specmd_jax"
    package.mkdir()
    (package / "replay.py").write_text("import specmd_jax.timing")
    (package / "timing.py").write_text("")
    assert import_circle(tmp_path) == []
    (package / "timing.py").write_text("from specmd_jax.replay import run")
    assert set(import_circle(tmp_path)) == {"specmd_jax.replay", "specmd_jax.timing"}
