"""Write docs/vllm_names.md: every name of vLLM that this package touches, and who still has it.

Both sides are parsed, never imported, so any version of vLLM can be checked without installing it:

    python docs/hooks/vllm_names.py                     # the installed version
    python docs/hooks/vllm_names.py DIR [DIR ...]       # also those whose `vllm/` lies in DIR

A name is found where its type can be told: imports (also as text, "module:name"), attributes of
what is imported, attributes of arguments annotated with a class of vLLM (and of what these hold, by
vLLM's own annotations), methods overridden, attributes replaced, and names that docstrings of our
compat files give as `Class.name`. The columns of versions that are not at hand stay as the page has
them.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from vllm_source import (
    Name,
    Source,
    arguments,
    class_names,
    imports,
    members,
    optional_imports,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "vllm_names.md"
PACKAGE = ROOT / "vllm_adainfer"
NOT_CHECKED = "not checked"
HEADING = """# Names of vLLM that we touch

`make vllm-names` writes this page from the code; do not edit it. When a new minor version of vLLM
comes, [check it](../CONTRIBUTING.md#check-a-new-vllm-minor) against this list.

- **undocumented**: only our compat files use the name; their docstrings say what it is for.
- **yes**: the name is in the source of that version. Whether it behaves as before, tests say.
- **yes, other arguments**: the function takes other arguments than in vLLM {version}.
- **imported if there**: another name takes its place in versions without it.

Attributes of objects that have no type (`Any`, in our code or in vLLM's) are missing here: nothing
says whose they are. The types are those of vLLM {version}.

"""


class Scope(NamedTuple):
    """Where an expression of ours stands.

    Attributes:
        known: local names with their classes of vLLM (or modules, or objects of modules).
        owner: the class of ours whose method this is.

    """

    known: dict[str, list[Name]]
    owner: ast.ClassDef | None


class Touches:
    """Names of vLLM that a package touches: by name, how and in which files."""

    def __init__(self, package: Path, source: Source) -> None:
        """Read all files of `package`, and tell types by `source`."""
        self.source = source
        self.how: defaultdict[Name, set[str]] = defaultdict(set)
        self.files: defaultdict[Name, set[str]] = defaultdict(set)
        trees = {path: ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
        self.ours: dict[str, tuple[ast.ClassDef, dict[str, list[Name]]]] = {}
        scopes: dict[Path, Scope] = {}
        for path, tree in trees.items():
            self.file = path.relative_to(package).as_posix()
            bound: defaultdict[str, list[Name]] = defaultdict(list)
            for local, name in imports(tree, "", is_package=False):
                bound[local].append(name)
                self.note(name, "imported")
            for name in optional_imports(tree):
                self.how[name] = {"imported if there"}
            classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
            self.ours |= {node.name: (node, bound) for node in classes}
            scopes[path] = Scope(dict(bound), None)
        for path, tree in trees.items():
            self.file = path.relative_to(package).as_posix()
            self.visit(tree, scopes[path])
            if is_compat(self.file):
                self.read_docstrings(tree)

    def note(self, name: Name, how: str) -> None:
        """Note that the file at hand touches a name."""
        self.how[name].add(how)
        self.files[name].add(self.file)

    def visit(self, node: ast.AST, scope: Scope) -> None:
        """Walk what is below a node of our code."""
        for child in ast.iter_child_nodes(node):
            inner = scope
            match child:
                case ast.ClassDef():
                    self.visit_class(child)
                    inner = Scope(dict(scope.known), child)
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    given = arguments(child).items()
                    types = {name: self.annotated(text, scope) for name, text in given}
                    inner = Scope({**scope.known, **types}, scope.owner)
                case ast.For(target=ast.Name(name), iter=ast.Tuple(parts)):  # of modules, say
                    each = [self.types(part, scope) for part in parts]
                    scope.known[name] = [one for names in each for one in names]
                case ast.Assign(targets=[ast.Name(name)]):
                    scope.known[name] = self.types(child.value, scope)
                case ast.Call(args=[owner, ast.Constant(str(name)), *_]):
                    if ast.unparse(child.func) == "mock.patch.object":
                        self.touch(owner, name, "replaced", scope)
                case ast.Constant(str(text)) if re.fullmatch(r"vllm\.[\w.]+:\w+", text):
                    self.note(Name(*text.split(":")), "imported")
                case ast.Attribute():
                    how = "set" if isinstance(child.ctx, ast.Store) else "used"
                    self.touch(child.value, child.attr, how, scope)
            self.visit(child, inner)

    def visit_class(self, owner: ast.ClassDef) -> None:
        """Note what a class of ours overrides."""
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found = self.source.first_with(self.bases(owner), node.name)
                if found is not None:
                    self.note(found.name, "overridden")

    def bases(self, owner: ast.ClassDef) -> list[Name]:
        """The classes of vLLM that a class of ours derives from, also by way of others of ours."""
        found = []
        bound = self.ours[owner.name][1]
        for base in map(ast.unparse, owner.bases):
            found += bound.get(base, [])
            if base in self.ours:
                found += self.bases(self.ours[base][0])
        return found

    def has(self, owner: ast.ClassDef, attribute: str) -> bool:
        """Whether an attribute is of a class of ours, or of one of its bases that is ours."""
        ours = [self.ours[base][0] for base in map(ast.unparse, owner.bases) if base in self.ours]
        return attribute in members(owner) or any(self.has(base, attribute) for base in ours)

    def annotated(self, annotation: ast.expr | None, scope: Scope) -> list[Name]:
        """The classes of vLLM that an annotation in our code names."""
        names = class_names(annotation)
        return [found for name in names for found in scope.known.get(name, [])]

    def touch(self, value: ast.expr, attribute: str, how: str, scope: Scope) -> None:
        """Note an attribute of an expression, if it is one of vLLM."""
        is_self = ast.unparse(value) == "self"
        if is_self and scope.owner is not None and self.has(scope.owner, attribute):
            return
        holders = self.types(value, scope)
        found = [self.source.find_attribute(holder, attribute) for holder in holders]
        for one in filter(None, found):
            self.note(one.name, how)
        # What vLLM annotates is not always what it assigns, so only our own word counts here.
        if holders and not any(found) and isinstance(value, ast.Name) and not is_self:
            defined = self.source.find(holders[0])
            if defined is not None and isinstance(defined.node, ast.ClassDef):
                self.note(Name(defined.name.module, f"{defined.node.name}.{attribute}"), how)

    def types(self, value: ast.expr, scope: Scope) -> list[Name]:
        """The classes (or modules, or objects of modules) of vLLM that an expression may have."""
        match value:
            case ast.Name("self") if scope.owner is not None:
                return self.bases(scope.owner)
            case ast.Name(name):
                return scope.known.get(name, [])
            case ast.Call(ast.Name(name)):  # a class makes an object, a function returns one
                return [made for called in scope.known.get(name, []) for made in self.made(called)]
            case ast.Call(called):
                return self.types(called, scope)
            case ast.Attribute(owner, attribute):
                holders = self.types(owner, scope)
                found = [self.source.find_attribute(holder, attribute) for holder in holders]
                return [name for one in filter(None, found) for name in self.source.classes_of(one)]
        return []

    def made(self, name: Name) -> list[Name]:
        """What a call of a class or function of vLLM gives."""
        found = self.source.find(name)
        if found is None or isinstance(found.node, ast.ClassDef):
            return [name]
        return self.source.classes_of(found)

    def read_docstrings(self, tree: ast.AST) -> None:
        """Note names that docstrings give as `Class.name`."""
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            stated = re.findall(r"`([A-Z]\w+)\.(\w+)`", text) if isinstance(text, str) else []
            for owner, attribute in stated:
                if owner not in self.ours:
                    modules = self.source.classes.get(owner, ["?"])
                    names = [Name(module, owner) for module in modules]
                    found = self.source.first_with(names, attribute)
                    missing = Name(modules[0], f"{owner}.{attribute}")
                    self.note(missing if found is None else found.name, "named")


def is_compat(file: str) -> bool:
    """Whether a file of ours is for undocumented names."""
    return any(part.startswith("compat") for part in Path(file).parts)


def written() -> dict[Name, dict[str, str]]:
    """What the page says of each name, by version."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    header, _, *rows = [line[2:-2].split(" | ") for line in lines if line[:1] == "|"] or [[], []]
    return {
        Name(row[0].strip("`"), row[1].strip("`")): dict(zip(header[5:], row[5:], strict=True))
        for row in rows
    }


def typed_by() -> str:
    """The version that told the types when the page was written."""
    return re.findall(r"types are those of vLLM (\S+)\.$", PAGE.read_text(), re.MULTILINE)[0]


def page(sources: Sequence[Source], package: Path = PACKAGE) -> str:
    """The page; the first of `sources` tells types."""
    touches = Touches(package, sources[0])
    before = written()
    checked = {source.version: source for source in sources}
    versions = sorted({*checked, *(version for cells in before.values() for version in cells)})
    rows = [
        ["module", "name", "", "how", "in", *versions],
        ["---"] * (5 + len(versions)),
    ]
    for name in sorted(touches.how):
        files = sorted(touches.files[name])
        cells = [
            status(name, checked[version], sources[0])
            if version in checked
            else before.get(name, {}).get(version, NOT_CHECKED)
            for version in versions
        ]
        rows.append(
            [
                f"`{name.module}`",
                f"`{name.name}`",
                "undocumented" if all(map(is_compat, files)) else "",
                ", ".join(sorted(touches.how[name])),
                ", ".join(f"`{file}`" for file in files),
                *cells,
            ]
        )
    return HEADING.format(version=sources[0].version) + "".join(
        f"| {' | '.join(row)} |\n" for row in rows
    )


def status(name: Name, source: Source, reference: Source) -> str:
    """Whether `source` has a name, and the same arguments as in `reference`."""
    found, known = source.find(name), reference.find(name)
    if found is None:
        return "**no**"
    if known is not None and signature(found.node) != signature(known.node):
        return "yes, other arguments"
    return "yes"


def signature(node: ast.AST) -> str:
    """The arguments of a function, nothing for anything else."""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return ast.unparse(node.args) if is_function else ""


def installed() -> Source:
    """The installed version."""
    spec = find_spec("vllm")
    assert spec is not None, "vLLM is not installed: make setup"
    assert spec.origin is not None
    return Source(Path(spec.origin).parents[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", type=Path)
    PAGE.write_text(page([installed(), *map(Source, parser.parse_args().folders)]))
