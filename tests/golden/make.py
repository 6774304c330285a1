"""Keep what the code makes of golden artifacts: ``python -m tests.golden.make`` in the root.

Artifacts, inputs and runs of evaluations are data: they are of the format of November 2026, must
load for ever, and were made by this file as of commit 821b16e. This writes the results that are
missing beside an artifact. Delete some to make them again, and say in the commit why they differ.
"""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.golden.reading import (
    DECISIONS,
    HERE,
    NUMBERS,
    RUNS,
    SCORED,
    Inputs,
    certified,
    decisions,
    loaded,
    read,
    report,
    scored,
)


def flat(rows: Any) -> Iterator[tuple[str, Tensor]]:
    """What certifies, by name."""
    for name, exits in rows.items():
        for place, one in enumerate(exits):
            yield f"{name}/{place}/tokens", torch.from_numpy(one.tokens).short()
            yield f"{name}/{place}/full", torch.from_numpy(one.full).short()
            yield f"{name}/{place}/loss", torch.from_numpy(one.loss).to(torch.int8)
            yield f"{name}/{place}/score", one.score
            if one.relevance is not None:
                yield f"{name}/{place}/relevance", torch.from_numpy(one.relevance).float()


def write(case: str, seen: Inputs) -> None:
    """Write what the code makes of an artifact."""
    with tempfile.TemporaryDirectory() as draft:
        artifact = loaded(case, Path(draft))
    packed(HERE / case / DECISIONS, save(decisions(artifact, seen)))
    numbers: dict[str, Any] = {"capability": torch.backends.cpu.get_cpu_capability()}
    if rows := scored(artifact, seen):
        packed(HERE / case / SCORED, save(dict(flat(rows))))
        numbers["certified"] = certified(artifact.config, rows, seen)
    if (HERE / case / RUNS).exists():
        numbers["report"] = report(artifact.config, load(read(HERE / case / RUNS)))
    packed(HERE / case / NUMBERS, json.dumps(numbers).encode())


def packed(path: Path, content: bytes) -> None:
    """Write a file that `reading.read` reads."""
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """Write what is missing."""
    seen = Inputs.load()
    for case in sorted(path.parent.name for path in HERE.glob("*/config.json")):
        if not (HERE / case / NUMBERS).exists():
            write(case, seen)
            sys.stdout.write(f"{case}\n")


if __name__ == "__main__":
    main()
