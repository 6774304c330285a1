"""README and docs say what the code and the committed results say."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import readme_table
from tests.families import FAMILIES
from vllm_adainfer.engine.classes import MODELS

ROOT = Path(__file__).parents[2]


def test_the_result_tables_are_generated_from_the_committed_results():
    generated = {
        readme_table.README: readme_table.headlines(),
        readme_table.RESULTS: readme_table.tables(),
    }
    for path, part in generated.items():
        page = path.read_text()
        assert page == readme_table.updated(page, part), "run benchmarks/readme_table.py"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_table_of_models_has_the_architectures_that_are_served_and_what_tests_them():
    page = (ROOT / "docs" / "models.md").read_text()
    section = page[page.index("## Models") : page.index("## Limits")]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[2])} == MODELS.keys()
    assert {name.strip() for row in rows for name in row[3].split(",")} == FAMILIES.keys()
