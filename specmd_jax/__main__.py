"""``specmd`` and ``python -m specmd_jax``: every command of the project under one name.

The commands are no part of the library, which never imports them. In a checkout they are its folders `experiments` and
`configs`; an installed package has the same two folders inside, where they are nobody else's top-level modules. Here
whichever of them there is goes onto the path of this process, and what was typed to `experiments.common.verbs`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

INSTALLED = "_commands"  # the folder inside an installed package (pyproject.toml puts it there)


def commands_folder(package: Path) -> Path:
    """Gives the folder that holds `experiments` and `configs` of this package; raises `FileNotFoundError`."""
    for folder in (package / INSTALLED, package.parent):
        if (folder / "experiments" / "common" / "verbs.py").is_file():
            return folder
    raise FileNotFoundError(f"{package}: its commands are missing, expected a whole installation or a checkout")


def main() -> None:
    """Runs the command that was typed; an interrupt is one line and status 130 from here on, imports included."""
    try:
        sys.path.insert(0, str(commands_folder(Path(__file__).resolve().parent)))
        import_module("experiments.common.verbs").main()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
