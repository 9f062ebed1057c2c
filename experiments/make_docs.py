"""Writes what the documentation takes from the code and from replays: tables, found numbers, the picture.

    python -m experiments.make_docs --tables     # seconds: what follows from the code's own tables
    python -m experiments.make_docs --picture    # half a minute: docs/images/capacity-*.svg
    python -m experiments.make_docs --reference  # 5 minutes: the numbers of docs/reference_model.md
    python -m experiments.make_docs --unseen     # 15 minutes: what 20,000 tokens of a model are worth
    python -m experiments.make_docs              # all, with the numbers of docs/findings.md: about half an hour

Pages keep such a piece between <!-- made: NAME --> and <!-- /made -->, and the rest of them is written by hand. Tests
compare the tables, and some of the numbers, with what this command would write. Some of the blocks are made of the
results of studies in --results, which run first if they are not there; ones that other code made are refused.
Works in the folder of a checkout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.common.command_line import bare_parser, main_guard
from experiments.documenting.blocks import with_blocks
from specmd_jax.errors import SpecmdError
from specmd_jax.files import replace_text

FINDINGS, REFERENCE_MODEL = Path("docs/findings.md"), Path("docs/reference_model.md")
LEARNED = Path("specmd_jax/learn/README.md")
IMAGES = Path("docs/images")


def main(argv: Sequence[str] | None = None) -> None:
    options = bare_parser(__doc__, "make_docs")
    part = options.add_mutually_exclusive_group()
    part.add_argument("--tables", action="store_true", help="only what follows from the code's own tables")
    part.add_argument("--picture", action="store_true", help="only the picture")
    part.add_argument("--reference", action="store_true", help="only the numbers of the model of the package")
    part.add_argument("--unseen", action="store_true", help="only the numbers of a model that nobody trained on")
    options.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="folders of studies (default: results)"
    )
    args = options.parse_args(argv)
    from experiments.documenting import found, picture, reference, unseen
    from experiments.documenting.tables import TABLES

    if not FINDINGS.is_file():
        raise SpecmdError(f"{FINDINGS}: no such file, expected to be in the folder of a checkout")
    every = not (args.tables or args.picture or args.reference or args.unseen)
    if every or args.tables:
        for page, blocks in TABLES.items():
            _write(Path(page), {name: make() for name, make in blocks.items()})
    if every or args.picture:
        for path in picture.draw(IMAGES):
            print(path)
    if every or args.reference:
        _write(REFERENCE_MODEL, {name: make(args.results) for name, make in reference.STUDIED.items()})
    if every or args.unseen:
        _write(LEARNED, {name: make(args.results) for name, make in unseen.STUDIED.items()})
    if every:
        replayed = {name: make() for name, make in found.REPLAYED.items()}
        _write(FINDINGS, replayed | {name: make(args.results) for name, make in found.STUDIED.items()})


def _write(page: Path, bodies: dict[str, str]) -> None:
    """Puts blocks into a page."""
    before = page.read_text(encoding="utf-8")
    after = with_blocks(before, bodies, str(page))
    if after != before:
        replace_text(page, after)
    print(f"{page}{'' if after != before else ': as it was'}")


if __name__ == "__main__":
    main_guard(main)
