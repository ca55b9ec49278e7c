"""Hooks of `mkdocs build`: a folder in which the package is called `mapet`, and the pages that lie at the root."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ROOT_PAGES = ("architecture.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_startup(**_: Any) -> None:
    """Makes `.docs_root/mapet` of links to the modules and rooms: the API reference looks for a package `mapet`."""
    package = ROOT / ".docs_root" / "mapet"
    package.mkdir(parents=True, exist_ok=True)
    for path in (*ROOT.glob("*.py"), *(init.parent for init in ROOT.glob("*/__init__.py"))):
        link = package / path.name
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", path.name))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages at the repository's root to the site; their links to docs/ then start in docs/."""
    for name in ROOT_PAGES:
        content = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the site, the pages of the repository's root lie beside those of docs/."""
    pages = "|".join(map(re.escape, ROOT_PAGES))
    return re.sub(rf"\]\(((?:\.\./)*)\.\./({pages})", r"](\1\2", markdown)
