"""Issue texts for vLLM quote the script beside them, which runs without this package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "upstream"
ISSUES = sorted(page.stem for page in FOLDER.glob("*.md") if page.stem != "rfc")
VERDICT = "reproduced: "


def script(name: str) -> ast.Module:
    return ast.parse((FOLDER / f"{name}.py").read_text())


def printed_lines(tree: ast.Module) -> list[str]:
    """Patterns of what a script prints where it finds the defect; values of f-strings are open."""
    patterns = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name("print"), args=[ast.Constant(str(text))]):
                patterns.append(re.escape(text))
            case ast.Call(func=ast.Name("print"), args=[ast.JoinedStr(parts)]):
                texts = (getattr(part, "value", None) for part in parts)
                patterns.append(
                    "".join(re.escape(one) if isinstance(one, str) else ".+" for one in texts)
                )
    return [one for one in patterns if one.startswith(VERDICT.strip())]


def imported_packages(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def test_each_issue_has_a_script_and_each_script_an_issue():
    assert len(ISSUES) >= 3
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == ISSUES


@pytest.mark.parametrize("name", ISSUES)
def test_an_issue_links_its_script_and_quotes_the_last_line_that_it_prints(name):
    page = (FOLDER / f"{name}.md").read_text()
    assert f"({name}.py)" in page
    [quoted] = [line for line in page.splitlines() if line.startswith(VERDICT)]
    [printed] = printed_lines(script(name))
    assert re.fullmatch(printed, quoted)


@pytest.mark.parametrize("name", ISSUES)
def test_a_script_runs_without_this_package_and_any_other_plugin(name):
    assert "vllm_adainfer" not in imported_packages(script(name))
    assert '"VLLM_PLUGINS": ""' in (FOLDER / f"{name}.py").read_text()
