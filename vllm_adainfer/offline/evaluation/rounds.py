"""Interleaved rounds: what is compared runs in turn, so that the load of the host falls on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from vllm_adainfer.offline.progress import progress

T = TypeVar("T")
ROUNDS = 12  # which goes round evenly among two, three, four or six
SLICES = 3  # a round of a third of the prompts is short, and many short rounds tell more


def turns(sides: Sequence[T], rounds: int, desc: str = "rounds") -> Iterator[tuple[int, T]]:
    """The number of each round with each side; which side comes first goes round."""
    with progress(total=rounds * len(sides), desc=desc, unit="run") as done:
        for number in range(rounds):
            first = number % len(sides)
            for side in [*sides[first:], *sides[:first]]:
                yield number, side
                done.update()


def in_rounds(
    names: Sequence[str], rounds: int, once: Callable[[str], T], desc: str = "rounds"
) -> dict[str, list[T]]:
    """The results of `once` for each name in each round, see `turns`."""
    found: dict[str, list[T]] = {name: [] for name in names}
    for _, name in turns(names, rounds, desc):
        found[name].append(once(name))
    return found


def slice_of(prompts: Sequence[T], number: int, least: int) -> Sequence[T]:
    """The prompts of a round: every third one, or fewer are left out so that there are `least`."""
    slices = max(1, min(SLICES, len(prompts) // least))
    return prompts[number % slices :: slices]
