"""README and docs say what the code and the committed results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme_table
from tests.families import FAMILIES
from vllm_adainfer.engine.classes import MODELS

ROOT = Path(__file__).parents[2]
SHARE = r"\d[\d.]* ?%"
WITH_INTERVAL = r"\d[\d.]*% \(-?\d[\d.]* to -?\d[\d.]*%\)"
# What no run measures: the confidence of intervals and bounds, and what is promised.
GIVEN = (
    r"\(95 %\)|95 % interval",
    r"(?i)bound (of |is )?[\d.]+ ?%",
    r"(epsilon|at most|confidence) [\d.]+ ?%",
    r"recall of \w+, [\d.]+%",
)


def test_the_result_tables_are_generated_from_the_committed_results():
    for path, part in readme_table.pages().items():
        page = path.read_text()
        assert page == readme_table.updated(page, part), "run benchmarks/readme_table.py"
    page = readme_table.README.read_text()
    assert page == readme_table.updated(page, readme_table.compared(), "compared")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/comparison.md"])
def test_no_measured_share_stands_without_its_interval(page):
    text = (ROOT / page).read_text()
    for known in (WITH_INTERVAL, *GIVEN):
        text = re.sub(known, "", text)
    assert not re.findall(rf".*{SHARE}.*", text)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_table_of_models_has_the_architectures_that_are_served_and_what_tests_them():
    page = (ROOT / "docs" / "models.md").read_text()
    section = page[page.index("## Models") : page.index("## Limits")]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[2])} == MODELS.keys()
    assert {name.strip() for row in rows for name in row[3].split(",")} == FAMILIES.keys()


def test_each_section_of_the_results_says_where_and_when_it_was_measured():
    part = readme_table.pages()[readme_table.DOCS / "results.md"]
    _, *sections = re.split(r"^## ", part, flags=re.M)
    assert sections
    assert not [one.splitlines()[0] for one in sections if "\n*Measured: " not in one]
