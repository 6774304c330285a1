"""Layers depend one way, as the reader of the main path expects."""

from __future__ import annotations

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(folder: Path) -> set[str]:
    """Every module imported anywhere in the Python files of `folder`."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = resolve_name("." * node.level + (node.module or ""), package)
                found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels/adainfer_kernels", ("vllm", "vllm_adainfer")),
        ("vllm_adainfer/decision", ("vllm", "vllm_adainfer.models", "vllm_adainfer.runtime")),
        ("vllm_adainfer/models", ("vllm_adainfer.calibration",)),
        ("vllm_adainfer/runtime", ("vllm_adainfer.calibration",)),
        ("vllm_adainfer/calibration", ("vllm_adainfer.suite", "vllm_adainfer.describe")),
        ("vllm_adainfer", ("vllm_adainfer.cli",)),
    ],
)
def test_a_layer_does_not_import_what_lies_above_it(folder, forbidden):
    modules = imports(ROOT / folder)
    assert modules
    assert not [m for m in modules if any(m == f or m.startswith(f"{f}.") for f in forbidden)]
