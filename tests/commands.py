"""Runs a command in the process of a test, as ``python -m experiments.<name>`` does in its own."""

from __future__ import annotations

import runpy
import sys

import pytest


def run_command(monkeypatch: pytest.MonkeyPatch, name: str, *options: str) -> None:
    """Runs ``experiments.<name>`` with these options; raises SystemExit where it ends so.

    A test may have imported the module before, and Python warns of running what is imported: it is forgotten meanwhile.
    """
    monkeypatch.delitem(sys.modules, f"experiments.{name}", raising=False)
    monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *options])
    runpy.run_module(f"experiments.{name}", run_name="__main__")
