"""The parts of all results that pages quote: how each is made, and which code it is about.

`parts.toml` lists them. A part is stale where code that it is about has changed since the commit
that its result names; comments and docstrings do not count.
"""

from __future__ import annotations

import ast
import json
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MANIFEST = ROOT / "benchmarks/parts.toml"
CHANGED = "-dirty"  # how git marks a commit with changes that were not committed


class Part(BaseModel):
    """A part of the results, which runs by itself.

    Attributes:
        result: the name of its file in ``results``.
        entry: the keys of the report in that file, if it holds several; or its name in it.
        commands: run one after the other by bash, from the checkout.
        about: names in ``rooms``: the code that the figures are about, beside its own scripts.
        minutes: how long it takes about, on two cores of an EPYC.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    result: str
    entry: Mapping[str, str | int] | str = ""
    commands: tuple[str, ...] = Field(min_length=1)
    about: tuple[str, ...] = Field(min_length=1)
    minutes: int = Field(gt=0, le=60)

    def report_in(self, folder: Path) -> Mapping[str, Any] | None:
        """Its report among the results of a folder; None if there is none."""
        file = folder / f"{self.result}.json"
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(self.entry, str):
            return found.get(self.entry) if self.entry else found
        wanted = self.entry.items()
        several = (one for one in found if all(one.get(key) == value for key, value in wanted))
        return next(several, None)


class Model(BaseModel):
    """A model that parts need, and the command that makes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    command: str

    @property
    def path(self) -> str:
        """What the commands of parts call it."""
        return f"$MODELS/{self.name}"


class Manifest(BaseModel):
    """`parts.toml`; ``rooms`` are names of lists of paths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rooms: Mapping[str, tuple[str, ...]]
    models: tuple[Model, ...]
    parts: tuple[Part, ...]

    def paths_of(self, part: Part) -> list[str]:
        """The files and folders that a part is about."""
        scripts = {word for line in part.commands for word in line.split() if word.endswith(".py")}
        return sorted({path for room in part.about for path in self.rooms[room]} | scripts)


def load_manifest() -> Manifest:
    """The manifest of this checkout."""
    return Manifest.model_validate(tomllib.loads(MANIFEST.read_text(encoding="utf-8")))


def why_stale(part: Part, manifest: Manifest, folder: Path = RESULTS) -> str | None:
    """Why the figures of a part in a folder are not those of today's code; None if they are."""
    report = part.report_in(folder)
    if report is None:
        return "was never measured"
    commit = report["provenance"]["git"]
    if commit is None:
        return "names no commit"
    if commit.endswith(CHANGED):
        return f"was measured with changes to {commit.removesuffix(CHANGED)} that no commit has"
    if git("rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}") is None:
        return f"was measured at {commit}, which this clone does not have"
    changed = next(changed_files(commit, manifest.paths_of(part)), None)
    return None if changed is None else f"was measured at {commit}, and {changed} has changed"


@cache
def _names_changed(commit: str) -> Sequence[str]:
    """The files that differ between a commit and the working tree."""
    return (git("diff", "--name-only", commit) or "").splitlines()


def changed_files(commit: str, paths: Sequence[str]) -> Iterator[str]:
    """Those of the `paths` whose code differs from that of a commit; new files are others' code."""
    for name in _names_changed(commit):
        if not any(name == path or name.startswith(f"{path}/") for path in paths):
            continue
        before, now = git("show", f"{commit}:{name}"), ROOT / name
        same = name.endswith(".py") and before is not None and now.is_file()
        if not same or differs(str(before), now.read_text(encoding="utf-8")):
            yield name


def differs(before: str, now: str) -> bool:
    """Whether two versions of a Python file do something else."""
    return code_of(before) != code_of(now)


def code_of(source: str) -> str:
    """What a Python file does: its syntax tree without docstrings; comments are not in it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            del body[0]
    return ast.dump(tree)


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def git(*arguments: str) -> str | None:
    """What git prints; None if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    return done.stdout.decode() if done.returncode == 0 else None
