"""The recipes: their data, and the size of their pages. `make docs-check` runs their commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


@pytest.mark.parametrize("recipe", ["guard", "judge", "moderation", "routing"])
def test_no_text_comes_twice_and_no_answer_is_that_of_most(recipe: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / "recipes" / f"{recipe}.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    train, test, lessons = (
        [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "test", "lessons")
    )
    template = (tmp_path / "template.txt").read_text()
    prompts = [template.format_map(row) for row in train + test] + [
        row["prompt"] for row in lessons
    ]
    assert len(set(prompts)) == len(prompts)
    [(_, most)] = Counter(json.dumps(row["label"]) for row in train).most_common(1)
    assert most < 0.8 * len(train)
    request = json.loads((tmp_path / "request.json").read_text())
    assert request["prompt"] == template.format_map(test[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_recipe_is_at_most_80_lines_and_the_table_has_it(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 80
    assert page.stem == "index" or f"]({page.name})" in page.with_name("index.md").read_text()
