"""Names in tables of the project, read from their source: importing most of the tables brings JAX."""

from __future__ import annotations

import ast
import functools
from importlib import import_module
from pathlib import Path


@functools.cache
def source_of(module: str) -> ast.Module:
    """Gives the source of a module of this project, without importing it or what it lies in."""
    top, *rest = module.split(".")
    package = import_module(top).__file__
    assert package is not None
    path = Path(package).parent.joinpath(*rest)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@functools.cache
def keys_of(module: str, table: str) -> tuple[str, ...]:
    """Gives the names in a table that is written as a dictionary, or a tuple of names, in order.

    Raises `TypeError` for one that is written otherwise: its names are known only to who imports it.
    """
    for line in source_of(module).body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if not any(isinstance(target, ast.Name) and target.id == table for target in targets):
            continue
        value = getattr(line, "value", None)
        items = value.keys if isinstance(value, ast.Dict) else value.elts if isinstance(value, ast.Tuple) else []
        names = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        if names and len(names) == len(items):
            return tuple(names)
    raise TypeError(f"{module} has no {table} that is written name by name")


def runnable_models() -> tuple[str, ...]:
    """Gives the published models whose family can be run, as `specmd_jax.moe.model.published` has them."""
    from specmd_jax.specs.published import PUBLISHED

    families = keys_of("specmd_jax.moe.model.families.table", "FAMILIES")
    return tuple(name for name, config in PUBLISHED.items() if config["model_type"] in families)
