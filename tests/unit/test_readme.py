"""README's numbers are those of the committed results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from tests.families import FAMILIES
from vllm_adainfer.engine.architectures import MODELS

ROOT = Path(__file__).parents[2]


def test_the_result_tables_are_generated_from_the_committed_results():
    spec = importlib.util.spec_from_file_location(
        "readme_table", ROOT / "benchmarks" / "readme_table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    readme_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme_table)
    readme = (ROOT / "README.md").read_text()
    assert readme == readme_table.updated(readme), "run benchmarks/readme_table.py"


def test_the_table_of_models_has_the_architectures_that_are_served_and_what_tests_them():
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Models") : readme.index("## Limits")]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[2])} == MODELS.keys()
    assert {name.strip() for row in rows for name in row[3].split(",")} == FAMILIES.keys()
