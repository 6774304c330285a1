"""Write the generated parts of README and docs from the committed results.

.venv/bin/python benchmarks/readme_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # imports start at the checkout

from benchmarks.front_page import RESULTS, compared, headlines
from benchmarks.results_page import results_page

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# Pages that quote the Markdown of one result.
QUOTED = {"comparison": "rivals", "self_calibration": "ledger", "monitoring": "monitor"}


def updated(page: str, generated: str, name: str = "results") -> str:
    """`page` with the generated part of that name replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{generated}\n{end}{after}"


def pages() -> dict[Path, str]:
    """The generated part of each page; README has two."""
    return {
        README: headlines(),
        DOCS / "results.md": results_page(),
        **{
            DOCS / f"{page}.md": (RESULTS / f"{result}.md").read_text().rstrip()
            for page, result in QUOTED.items()
        },
    }


if __name__ == "__main__":
    for path, part in pages().items():
        path.write_text(updated(path.read_text(), part))
    README.write_text(updated(README.read_text(), compared(), "compared"))
