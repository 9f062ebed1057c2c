"""Pages of the site that lie elsewhere in the repository, and links between all of them.

A page links to files of the repository, as it is read there (``../specmd_jax/CONTRACT.md``). On the site some of these
files are pages of their own: their links are turned around when it is built.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "contract.md": "specmd_jax/CONTRACT.md",
    "running.md": "specmd_jax/moe/README.md",
    "measured_bfloat16.png": "specmd_jax/moe/measured_bfloat16.png",
    "learned.md": "specmd_jax/learn/README.md",
    "formats.md": "specmd_jax/trace/importers/README.md",
    "cluster.md": "experiments/CLUSTER.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Place on the site -> place in the repository."""
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie elsewhere."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Gives the page with links to files of the repository as links to pages of the site."""
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, page: str) -> str:
    """Gives the text of a page (its place on the site) with links to files that are pages turned into those."""
    pages = {source: place for place, source in ELSEWHERE.items()}
    source = ELSEWHERE.get(page, f"docs/{page}")

    def turned(found: re.Match[str]) -> str:
        target = found[2]
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is None:
            return found[0]  # the strict build says that it leads nowhere
        return f"{found[1]}{posixpath.relpath(place, posixpath.dirname(page) or '.')}{found[3] or ''}{found[4]}"

    return _LINK.sub(turned, markdown)
