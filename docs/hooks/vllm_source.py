"""Read vLLM's source without importing it: what its modules and classes define."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple


class Name(NamedTuple):
    """A name in one of vLLM's modules: ``X``, or ``X.attribute`` of a class."""

    module: str
    name: str


class Found(NamedTuple):
    """Where vLLM defines a name, and its annotation (of a function, what it returns), if any."""

    name: Name
    node: ast.AST
    annotation: ast.expr | None = None


class Source:
    """The source of one version of vLLM."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds ``vllm/``."""
        self.folder = folder
        stated = (folder / "vllm" / "_version.py").read_text()
        match = re.search(r"version = '(\d+\.\d+)", stated)
        assert match is not None, f"{folder}/vllm/_version.py names no version"
        self.version = match[1]
        self._bindings: dict[str, dict[str, ast.AST | Name]] = {}

    def path(self, module: str) -> Path | None:
        """The file of a module, None if there is none."""
        place = self.folder.joinpath(*module.split("."))
        return next(filter(Path.is_file, (place / "__init__.py", place.with_suffix(".py"))), None)

    def bindings(self, module: str) -> dict[str, ast.AST | Name]:
        """What a module binds at its top level: definitions, and names imported from vLLM."""
        if module not in self._bindings:
            path = self.path(module)
            self._bindings[module] = {} if path is None else self._bound_in(path, module)
        return self._bindings[module]

    def _bound_in(self, path: Path, module: str) -> dict[str, ast.AST | Name]:
        tree = ast.parse(path.read_text())
        found: dict[str, ast.AST | Name] = {}
        for name, place in imports(tree, module, path.name == "__init__.py"):
            if name == "*":
                found |= {part: Name(place.module, part) for part in self.bindings(place.module)}
            else:
                found[name] = place
        for node in statements(tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[node.name] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = node
            elif isinstance(node, ast.Assign):
                found |= {part.id: node for part in node.targets if isinstance(part, ast.Name)}
                if ast.unparse(node.targets[0]) == "MODULE_ATTRS":  # of a lazy module
                    for name, place in ast.literal_eval(node.value).items():
                        source, _, original = place.partition(":")
                        found[name] = Name(f"{module}{source}", original)
        return found

    def find(self, name: Name) -> Found | None:
        """Where a name is defined, however often it is imported on the way."""
        first, _, attribute = name.name.partition(".")
        if attribute:
            return self.find_attribute(Name(name.module, first), attribute)
        bound = self.bindings(name.module).get(first)
        if isinstance(bound, Name):
            return self.find(bound) or self.module_found(bound)
        if bound is None:
            return self.module_found(name)
        return Found(name, bound, annotation_of(bound))

    def module_found(self, name: Name) -> Found | None:
        """A submodule, which is found as the module `name` without a node of its own."""
        module = f"{name.module}.{name.name}"
        return None if self.path(module) is None else Found(Name(module, ""), ast.Module([], []))

    def find_attribute(self, owner: Name, attribute: str) -> Found | None:
        """Where a class, one of its bases, or the class of an object has an attribute."""
        found = self.find(owner)
        if found is None:
            return None
        if isinstance(found.node, ast.Module):
            return self.find(Name(found.name.module, attribute))
        if not isinstance(found.node, ast.ClassDef):
            return self.first_with(self.classes_of(found), attribute)
        if attribute in members(found.node):
            full = Name(found.name.module, f"{found.node.name}.{attribute}")
            return Found(full, *members(found.node)[attribute])
        bases = [self.classes_named(found.name.module, base) for base in found.node.bases]
        return self.first_with([name for names in bases for name in names], attribute)

    def first_with(self, owners: Iterable[Name], attribute: str) -> Found | None:
        """The attribute of the first of several classes that has it."""
        each = (self.find_attribute(owner, attribute) for owner in owners)
        return next(filter(None, each), None)

    def classes_of(self, found: Found) -> list[Name]:
        """The classes that what is found may have, by its annotation."""
        return self.classes_named(found.name.module, found.annotation)

    def classes_named(self, module: str, annotation: ast.expr | None) -> list[Name]:
        """The classes of vLLM in an annotation in a module; none if it allows others, too."""
        each = [self.find(Name(module, name)) for name in class_names(annotation)]
        known = [one.name for one in each if one is not None and isinstance(one.node, ast.ClassDef)]
        return known if len(known) == len(each) else []

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        """Modules by the names of the classes that they define."""
        modules = defaultdict(list)
        for path in sorted((self.folder / "vllm").rglob("*.py")):
            parts = path.relative_to(self.folder).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE):
                modules[name].append(module)
        return modules


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, those in ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, Name]]:
    """Names that a file binds to names of vLLM, wherever in it."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*parts, *([node.module] if node.module else [])])
        if source.partition(".")[0] == "vllm":
            for alias in node.names:
                yield alias.asname or alias.name, Name(source, alias.name)


def optional_imports(tree: ast.AST) -> set[Name]:
    """Names of vLLM that a file imports where it has something else if they are not there."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    guarded = [node for node in tries if "ImportError" in map(caught, node.handlers)]
    return {name for node in guarded for _, name in imports(node, "", is_package=False)}


def caught(handler: ast.ExceptHandler) -> str:
    """What a handler catches, as it is written."""
    return "" if handler.type is None else ast.unparse(handler.type)


def class_names(annotation: ast.expr | None) -> Iterator[str]:
    """The names in an annotation, but None: of it, of its union, of what is quoted or optional."""
    if isinstance(annotation, ast.BinOp):
        yield from class_names(annotation.left)
        yield from class_names(annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Optional":
        yield from class_names(annotation.slice)
    elif isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from class_names(ast.parse(annotation.value, mode="eval").body)
    elif annotation is not None and ast.unparse(annotation) != "None":
        yield ast.unparse(annotation)


def annotation_of(node: ast.AST) -> ast.expr | None:
    """What a definition is annotated with."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.returns
    return node.annotation if isinstance(node, ast.AnnAssign) else None


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, ast.expr | None]:
    """The arguments of a function with their annotations."""
    listed = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return {argument.arg: argument.annotation for argument in listed}


@cache
def members(owner: ast.ClassDef) -> dict[str, tuple[ast.AST, ast.expr | None]]:
    """Attributes of a class, each with its annotation: of its body, and set on ``self``."""
    found: dict[str, tuple[ast.AST, ast.expr | None]] = {}
    functions = []
    for node in statements(owner.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.append(node)
            found.setdefault(node.name, (node, node.returns))
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target, annotation in assigned(node, {}):
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, (node, annotation))
    for function in functions:
        given = arguments(function)
        for node in ast.walk(function):
            if isinstance(node, ast.AnnAssign | ast.Assign):
                for target, annotation in assigned(node, given):
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        found.setdefault(target.attr, (node, annotation))
    return found


def assigned(
    node: ast.Assign | ast.AnnAssign, given: dict[str, ast.expr | None]
) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """What is assigned to, each with its annotation, or that of an argument assigned to it."""
    if isinstance(node, ast.AnnAssign):
        yield node.target, node.annotation
        return
    annotation = given.get(node.value.id) if isinstance(node.value, ast.Name) else None
    for target in node.targets:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            yield part, annotation
