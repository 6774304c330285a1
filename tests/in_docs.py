"""Code that pages show, as a reader copies it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def code_of(page: str) -> dict[str, Any]:
    """What the blocks ``python`` of a page define, run one after the other."""
    found: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S):
        exec(block, found)
    return found


def field_probabilities(content: Any, schema: dict[str, Any]) -> dict[str, dict[Any, float]]:
    """The function of ``docs/structured.md``."""
    read: dict[str, dict[Any, float]] = code_of("structured.md")["field_probabilities"](
        content, schema
    )
    return read
