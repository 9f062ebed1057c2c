"""Reading what torch saved, without running anything that is in it."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import require_file


def load_torch(path: Path) -> Any:
    """Gives plain objects and numpy arrays. Raises `SpecmdError` without torch, or for a file that it cannot read."""
    require_file(path)
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise SpecmdError(
            f"{path}: needs torch to be read (pip install torch), or the same as .json or .npz"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise SpecmdError(f"{path}: cannot read: {reason[:200]}") from error

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.numpy() if value.ndim else value.item()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(content)
