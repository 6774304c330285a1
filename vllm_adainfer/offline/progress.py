"""Progress of long work: a bar on a terminal, otherwise a line every 30 seconds."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from typing_extensions import override

SECONDS = 30
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left"


class _Lines(io.StringIO):
    """Writes each state of a tqdm bar to standard error, as a line of its own."""

    last = ""

    @override
    def write(self, text: str) -> int:
        line = text.strip()
        if line and line != self.last:
            self.last = line
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        return len(text)


def progress(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str, **more: Any
) -> tqdm[Any]:
    """A `tqdm` over `iterable`, or of `total` steps; `more` are options for a terminal."""
    if sys.stderr.isatty():
        return tqdm(iterable, total=total, desc=desc, disable=False, **more)
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        disable=False,
        file=_Lines(),
        mininterval=SECONDS,
        maxinterval=SECONDS,
        bar_format=LINE,
    )


def say(stage: str) -> None:
    """Print the current stage of work that has no steps to count."""
    sys.stderr.write(f"{stage} ...\n")
    sys.stderr.flush()


def in_words(seconds: float) -> str:
    """A duration in whole minutes, at least one."""
    minutes = max(1, math.ceil(seconds / 60))
    return f"{minutes} minute{'s' * (minutes > 1)}"
