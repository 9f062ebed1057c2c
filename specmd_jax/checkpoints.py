"""Checkpoints of a run that trains or searches: the last two, from which a killed one goes on bit for bit."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from specmd_jax.errors import SpecmdError, one_line

UNFINISHED = "*.orbax-checkpoint-tmp"
"""What orbax calls a checkpoint until it is whole."""
SAID = 200  # most characters of an error that are told


class Checkpoints:
    """The checkpoints in a folder; `checkpoints` makes it."""

    def __init__(self, folder: Path, manager: ocp.CheckpointManager) -> None:
        self._folder, self._manager = folder, manager

    @property
    def latest(self) -> int | None:
        """The step of the last one; None: there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Mapping[str, Any]) -> None:
        """Writes a checkpoint, in the place of one of the same step; on return it outlives this process.

        Raises SpecmdError if it cannot be written. Those before it are as they were, and nothing is left of it.
        """
        try:
            with _quiet():
                if step in self._manager.all_steps():
                    self._manager.delete(step)
                self._manager.save(step, args=ocp.args.StandardSave(tree))
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:  # ValueError: of the store that orbax writes with
            for path in self._folder.glob(UNFINISHED):
                shutil.rmtree(path, ignore_errors=True)
            told = f"cannot write a checkpoint: {_reason(error)}; the same command goes on from the last one"
            raise SpecmdError(f"{self._folder}: {told}") from error

    def restore(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the last one; `like` has its structure and shapes."""
        return dict(self._manager.restore(self._manager.latest_step(), args=ocp.args.StandardRestore(like)))


@contextlib.contextmanager
def checkpoints(folder: Path) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run in `folder`, which is made if it is missing.

    Raises SpecmdError if it cannot be made.
    """
    try:
        manager = ocp.CheckpointManager(
            folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )
    except OSError as error:
        raise SpecmdError(f"{folder}: cannot write: {error.strerror or error}") from error
    try:
        yield Checkpoints(folder, manager)
    finally:
        with _quiet(), contextlib.suppress(OSError, ValueError):  # what failed has been said
            manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what orbax logs to itself: of a checkpoint that fails, hundreds of lines that are in its exception, too."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _reason(error: Exception) -> str:
    """Gives the cause of an exception of orbax in a few words."""
    text = one_line(str(error))
    full = os.strerror(errno.ENOSPC)
    return full if full in text else text[:SAID]
