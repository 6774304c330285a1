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

from vllm_adainfer.offline.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MANIFEST = ROOT / "benchmarks/parts.toml"
CHANGED = "-dirty"  # how git marks a commit with changes that were not committed


class Part(BaseModel):
    """A part of the results, which runs by itself.

    Attributes:
        result: the name of its file in ``results``.
        entry: which of several reports in that file: what it says of itself, or its names in it.
        commands: run one after the other by bash, from the checkout; none for one that is made by
            hand, as `by_hand` says.
        about: names in ``rooms``: the code that the figures are about, beside its own scripts.
        minutes: how long it takes about, on two cores of an EPYC.
        processor: a word in the name of the processor that it is for; others keep what there is.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    result: str
    entry: tuple[str, ...] | Mapping[str, str | int] = ()
    commands: tuple[str, ...] = ()
    about: tuple[str, ...] = Field(min_length=1)
    minutes: int = Field(gt=0, le=60)
    by_hand: str = ""
    processor: str = ""

    @property
    def is_for_others(self) -> bool:
        """Whether its figures are those of another kind of processor."""
        return self.processor not in provenance()["cpu"]

    def provenances_in(self, folder: Path) -> list[Mapping[str, Any]]:
        """Those of its reports among the results of a folder; none where there is no report."""
        file = folder / f"{self.result}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if isinstance(self.entry, tuple):
            for name in self.entry:
                found = None if found is None else found.get(name)
        elif found is not None:
            wanted = self.entry.items()
            found = [one for one in found if all(one.get(key) == value for key, value in wanted)]
        several = [found] if isinstance(found, dict) else found or []
        return [one.get("provenance", one) for one in several]


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
    commits = dict.fromkeys(one["git"] for one in part.provenances_in(folder))
    if not commits:
        return "was never measured"
    paths = manifest.paths_of(part)
    return next((reason for one in commits if (reason := why_old(one, paths))), None)


def why_old(commit: str | None, paths: Sequence[str]) -> str | None:
    """Why a commit has not today's code in some paths; None if it has."""
    if commit is None:
        return "names no commit"
    if commit.endswith(CHANGED):
        return f"was measured with changes to {commit.removesuffix(CHANGED)} that no commit has"
    if git("rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}") is None:
        return f"was measured at {commit}, which this clone does not have"
    changed = next(changed_files(commit, paths), None)
    return None if changed is None else f"was measured at {commit}, and {changed} has changed"


@cache
def _names_changed(commit: str) -> Sequence[str]:
    """The files that differ between a commit and the working tree."""
    return (git("diff", "--name-only", commit) or "").splitlines()


def changed_files(commit: str, paths: Sequence[str]) -> Iterator[str]:
    """Those of the `paths` whose code differs from that of a commit, new files among them."""
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
