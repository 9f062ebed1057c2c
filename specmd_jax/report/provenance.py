"""Where results come from: the command, the code and its versions, and how a page says so."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, found without importing them."""
    found = {"python": platform.python_version()}
    for package in ("specmd-jax", "jax", "jaxlib", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit that this code is at, with ``-dirty`` behind it if tracked files changed; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # e.g. installed inside somebody else's checkout
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def command() -> str:
    """Gives the command line of this process, as a shell takes it."""
    typed = [arg for arg in sys.orig_argv[1:2] if Path(arg).name == "specmd"]  # a script, by the path of its file
    return shlex.join(["specmd", *sys.orig_argv[2:]] if typed else ["python", *sys.orig_argv[1:]])


def code(manifest: Mapping[str, Any]) -> str:
    """Version and commit of the code that made a table, by its manifest."""
    version = manifest.get("versions", {}).get("specmd-jax", "unknown")
    commit, dirty, _ = (manifest.get("git_commit") or "unknown").partition("-dirty")
    return f"version {version}, commit {commit[:12]}{dirty}"


def facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Gives what a page says of its origin, name by name."""
    found = {
        "command": manifest.get("command"),
        "started": manifest.get("started"),
        "finished": manifest.get("finished"),
        "commit": manifest.get("git_commit"),
        "trace, SHA-256": manifest.get("trace_sha256"),
        **{f"version of {name}": text for name, text in manifest.get("versions", {}).items()},
        **{f"setting {name}": value for name, value in manifest["config"].items()},
    }
    return {name: _shown(value) for name, value in found.items()}


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "-"
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)
