"""Progress of long work: a bar on a terminal, elsewhere a line every half minute."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from typing_extensions import override

SECONDS = 30
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left"


class _Lines(io.StringIO):
    """What tqdm would draw over the last line, as lines of its own on the error stream."""

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
    """A `tqdm` over `iterable` or of `total` steps; `more` are options of a terminal's bar."""
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
    """What is being done now, where it has no steps to count."""
    sys.stderr.write(f"{stage} ...\n")
    sys.stderr.flush()
