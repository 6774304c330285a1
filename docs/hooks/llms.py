"""``llms.txt`` of the site (llmstxt.org): the pages of its navigation, for programs that read."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page

LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
NO_TEXT = ("#", "|", "`" * 3, "- ", "<", "!")  # beginnings of headings, tables, code, lists, images
_nav: list[Navigation] = []  # of the build that runs


def on_nav(nav: Navigation, *, config: MkDocsConfig, files: Files) -> None:
    """Keep the navigation: its pages are read later."""
    _nav[:] = [nav]


def on_post_build(*, config: MkDocsConfig) -> None:
    """Write the file: pages alone first, then section by section."""
    [nav] = _nav
    alone = [item for item in nav.items if isinstance(item, Page)]
    parts = [f"# {config.site_name}", f"> {config.site_description}", _lines(alone)]
    for section in nav.items:
        if isinstance(section, Section):
            pages = [page for page in nav.pages if section in page.ancestors]
            parts.append(f"## {section.title}\n\n{_lines(pages)}")
    Path(config.site_dir, "llms.txt").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _lines(pages: list[Page]) -> str:
    return "\n".join(
        f"- [{page.title}]({page.url or 'index.html'}): {first_sentence(page.markdown or '')}"
        for page in pages
    )


def first_sentence(markdown: str) -> str:
    """The first sentence of a page, without links and marks; empty if it has no text."""
    paragraphs = (part.strip() for part in markdown.split("\n\n"))
    text = next((part for part in paragraphs if part and not part.startswith(NO_TEXT)), "")
    plain = re.sub(r"[*`]", "", LINK.sub(r"\1", " ".join(text.split())))
    return re.split(r"(?<=\.)\s", plain, maxsplit=1)[0]
