"""Rooms depend one way, as the reader of the main path expects, and no files form a circle."""

from __future__ import annotations

import ast
import itertools
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "vllm_adainfer", ROOT / "kernels" / "adainfer_kernels"
BELOW = {
    "kernels": set(),
    "errors": set(),
    "config": {"errors"},
    "policy": {"kernels", "errors", "config"},
    "exits": {"policy", "config"},
    "engine": {"exits", "policy", "kernels", "errors", "config"},
    "frontend": {"engine", "policy", "errors", "config"},
    "config_hook": {"frontend", "engine", "config"},
    "plugin": {"config_hook", "engine"},
    "stats": {"errors"},
    "offline": {"stats", "engine", "policy", "kernels", "errors", "config"},
    "cli": {"offline", "policy", "errors"},
}
"""What each room imports: the top-level packages and files of the project."""
WITHOUT_VLLM = "kernels", "errors", "config", "policy", "exits"


def modules() -> dict[str, Path]:
    """Every file of the project by its module's name."""
    found = {}
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """All that a file imports, anywhere in it: at its head, in functions, or for types alone."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return found


IMPORTS = {module: imports(module) for module in MODULES}


def room_of(module: str) -> str | None:
    """None for what lies outside the project, and for the package's own `__init__`."""
    if module.startswith("adainfer_kernels"):
        return "kernels"
    parts = module.split(".")
    return parts[1] if parts[0] == "vllm_adainfer" and len(parts) > 1 else None


def test_every_file_is_in_a_room_of_the_table():
    rooms = {room_of(module) for module in MODULES} - {None}
    assert rooms == set(BELOW)


@pytest.mark.parametrize(("above", "below"), itertools.permutations(BELOW, 2))
def test_a_room_imports_the_rooms_that_the_table_has_below_it_and_no_others(above, below):
    found = [
        (module, name)
        for module, names in IMPORTS.items()
        if room_of(module) == above
        for name in names
        if room_of(name) == below
    ]
    assert bool(found) == (below in BELOW[above]), found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other in turn, empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_files_import_each_other_in_a_circle():
    graph = {module: names & MODULES.keys() for module, names in IMPORTS.items()}
    assert circle(graph) == []


def test_a_circle_is_found_wherever_it_is():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


@pytest.mark.parametrize("room", WITHOUT_VLLM)
def test_what_decides_and_what_a_step_does_with_it_never_import_vllm(room):
    found = [
        (module, name)
        for module, names in IMPORTS.items()
        if room_of(module) == room
        for name in names
        if name.partition(".")[0] == "vllm"
    ]
    assert not found
