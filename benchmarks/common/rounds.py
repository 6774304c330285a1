"""Interleaved rounds: what is compared runs in turn, so that the load of the host falls on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from vllm_adainfer.offline.progress import progress

T = TypeVar("T")


def in_rounds(
    names: Sequence[str], rounds: int, once: Callable[[str], T], desc: str = "rounds"
) -> dict[str, list[T]]:
    """The results of `once` for each name in each round; which name comes first goes round."""
    found: dict[str, list[T]] = {name: [] for name in names}
    with progress(total=rounds * len(names), desc=desc, unit="run") as done:
        for number in range(rounds):
            first = number % len(names)
            for name in [*names[first:], *names[:first]]:
                found[name].append(once(name))
                done.update()
    return found
