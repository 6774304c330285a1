"""Put README on the site as its first page, and files of the repository that pages link to.

In the repository a page links to ``../benchmarks/README.md``; on the site that file lies at
``benchmarks/README.md``.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
HOME = "index.md"
# A link to a file: what stands before its path, the path, an anchor.
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add README, and what it and other pages link to outside ``docs``, and so on."""
    files.append(File.generated(config, HOME, abs_src_path=str(ROOT / "README.md")))
    known = {file.src_uri for file in files}
    read = [file for file in files if file.is_documentation_page()]
    while read:
        page = read.pop()
        for link in LINK.finditer(page.content_string):
            source = _source_of(page.src_uri).parent / link[2]
            uri = _uri_of(source)
            if uri in known or not source.is_file():
                continue
            added = File.generated(config, uri, abs_src_path=str(source))
            files.append(added)
            known.add(uri)
            if added.is_documentation_page():
                read.append(added)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are on the site."""
    here = page.file.src_uri

    def on_site(link: re.Match[str]) -> str:
        source = _source_of(here).parent / link[2]
        if not source.is_file():
            return link[0]  # a page made by another hook, or a dead link, which mkdocs reports
        up = "../" * here.count("/")
        return f"{link[1]}{up}{_uri_of(source)}{link[3]}"

    return LINK.sub(on_site, markdown)


def _source_of(uri: str) -> Path:
    """The file of a page."""
    if uri == HOME:
        return ROOT / "README.md"
    return ROOT / "docs" / uri if (ROOT / "docs" / uri).exists() else ROOT / uri


def _uri_of(source: Path) -> str:
    """Where a file of the repository lies on the site."""
    path = source.resolve().relative_to(ROOT)
    if path == Path("README.md"):
        return HOME
    return (path.relative_to("docs") if path.parts[0] == "docs" else path).as_posix()
