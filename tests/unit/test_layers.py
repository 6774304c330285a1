"""Rooms depend one way, as the reader of the main path expects, and no files form a circle."""

from __future__ import annotations

import ast
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "vllm_adainfer", ROOT / "kernels" / "adainfer_kernels"
BELOW = {
    "kernels": set(),
    "arrays": set(),
    "errors": set(),
    "files": {"errors"},
    "settings": {"strict", "errors"},
    "strict": set(),
    "transfers": {"arrays"},
    "artifact": {"promise", "drafts", "strict", "files", "errors"},
    "auto": {"watch", "files", "errors"},
    "drafts": set(),
    "promise": {"strict", "arrays", "errors"},
    "policy": {
        "promise",
        "artifact",
        "settings",
        "kernels",
        "transfers",
        "arrays",
        "errors",
    },
    "watch": {"promise", "artifact", "arrays", "errors"},
    "exits": {
        "watch",
        "policy",
        "promise",
        "artifact",
        "settings",
        "kernels",
        "transfers",
        "arrays",
        "errors",
    },
    "engine": {
        "auto",
        "drafts",
        "files",
        "exits",
        "watch",
        "policy",
        "promise",
        "artifact",
        "settings",
        "kernels",
        "transfers",
        "arrays",
        "errors",
    },
    "frontend": {"auto", "engine", "promise", "artifact", "settings", "errors"},
    "config_hook": {"frontend", "engine", "settings"},
    "plugin": {"config_hook", "engine"},
    "stats": {"errors"},
    "offline": {
        "auto",
        "drafts",
        "files",
        "stats",
        "engine",
        "exits",
        "policy",
        "promise",
        "artifact",
        "settings",
        "kernels",
        "arrays",
        "errors",
    },
    "cli": {"offline", "artifact", "promise", "errors"},
}
"""What each room imports: the top-level packages and files of the project."""
EXITS = {
    "accounting": set(),
    "batch": set(),
    "kv": {"batch"},
    "loop": {"kv", "batch", "accounting"},
    "recording": {"loop", "kv", "batch", "accounting"},
}
"""What each room of a step imports of the other ones."""
ENGINE = {
    "classes": set(),
    "pinned_artifacts": set(),
    "compat": set(),
    "admission": {"pinned_artifacts", "compat"},
    "scheduler": {"admission", "pinned_artifacts", "compat"},
    "segments": {"compat"},
    "cuda_graphs": {"segments", "compat"},
    "runner": {"cuda_graphs", "segments", "admission", "compat"},
    "model": {"runner", "cuda_graphs", "segments", "pinned_artifacts", "compat", "classes"},
    "startup": {"scheduler", "admission", "pinned_artifacts", "compat", "classes"},
    "self_test": {"model", "runner", "admission", "compat"},
    "worker": {"self_test", "runner", "startup", "scheduler", "admission", "compat"},
}
"""What each room of the engine imports of the other ones."""
CALIBRATION = {
    "options": set(),
    "data": set(),
    "record": {"data"},
    "fit": {"record", "data", "options"},
    "certify": {"fit", "data", "options"},
    "enough_rows": {"certify", "data", "options"},
    "prompts": {"enough_rows", "data", "options"},
    "fit_policy": {"certify", "fit", "record", "data"},
    "write": {"fit_policy", "certify", "fit"},
    "calibrate": {"fit_policy", "write", "prompts", "fit", "record", "data", "options"},
}
"""What each step of calibration imports of the other ones."""
OFFLINE = {
    "adapter": set(),
    "auto": {"calibration", "pretrained", "progress"},
    "calibration": {"facts", "adapter", "pretrained", "progress", "provenance"},
    "facts": set(),
    "reports": {"facts", "calibration", "adapter", "pretrained"},
    "evaluation": {"reports", "calibration", "adapter", "pretrained", "progress", "provenance"},
    "demo": {"evaluation", "reports", "calibration", "facts"},
    "doctor": {"evaluation", "reports", "calibration", "facts", "adapter", "pretrained"},
    "launch": {"served_model"},
    "pretrained": {"adapter"},
    "progress": set(),
    "provenance": set(),
    "push": {"calibration", "served_model"},
    "served_model": set(),
}
"""What each room of what a person runs imports of the other ones."""
WITHOUT_VLLM = (
    "kernels",
    "arrays",
    "transfers",
    "errors",
    "files",
    "settings",
    "strict",
    "artifact",
    "promise",
    "policy",
    "watch",
    "exits",
)
SERVING = (*WITHOUT_VLLM, "engine", "frontend", "config_hook", "plugin", "stats")
NOT_IN_SERVING = "sklearn", "plotly", "jinja2", "matplotlib"


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


def room_of(module: str, inside: str = "") -> str | None:
    """The room of a file: in the package, or `inside` one of its rooms.

    None for what lies outside, and for the ``__init__`` of what is divided into rooms.
    """
    if module.startswith("adainfer_kernels"):
        return None if inside else "kernels"
    place = f"vllm_adainfer.{inside}." if inside else "vllm_adainfer."
    return module.removeprefix(place).split(".")[0] if module.startswith(place) else None


HOUSES = [
    ("", BELOW),
    ("exits", EXITS),
    ("engine", ENGINE),
    ("offline", OFFLINE),
    ("offline.calibration", CALIBRATION),
]


@pytest.mark.parametrize(("inside", "table"), HOUSES)
def test_every_file_is_in_a_room_of_the_table(inside, table):
    rooms = {room_of(module, inside) for module in MODULES} - {None}
    assert rooms == set(table)


@pytest.mark.parametrize(("inside", "table"), HOUSES)
def test_each_room_imports_the_rooms_that_the_table_has_below_it_and_no_others(inside, table):
    found: dict[str, set[str]] = {room: set() for room in table}
    for module, names in IMPORTS.items():
        room = room_of(module, inside)
        if room is not None:
            found[room] |= {room_of(name, inside) for name in names} - {None, room}
    assert found == table


@pytest.mark.parametrize(("inside", "table"), HOUSES)
def test_rooms_form_no_circle(inside, table):
    assert circle(table) == []


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


def imported_from(rooms: Collection[str], packages: Collection[str]) -> list[tuple[str, str]]:
    """The imports of `packages` by files of `rooms`."""
    return [
        (module, name)
        for module, names in IMPORTS.items()
        if room_of(module) in rooms
        for name in names
        if name.partition(".")[0] in packages
    ]


def test_what_decides_and_what_a_step_does_with_it_never_import_vllm():
    assert imported_from(WITHOUT_VLLM, {"vllm"}) == []


def test_what_serves_never_imports_what_only_calibration_and_reports_need():
    assert imported_from(SERVING, NOT_IN_SERVING) == []
    assert imported_from({"offline"}, NOT_IN_SERVING)
