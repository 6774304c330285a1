"""Recognise what a prompt asks by the tokens it ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

End = tuple[int, ...]


def asked_among(questions: Iterable[Iterable[End]]) -> Callable[[Sequence[int]], int | None]:
    """A function from a prompt to the place of the question that it asks; None if it is not known.

    `questions` are the ends of the prompts of each, token ids; a question may have many. A prompt
    asks the one with the longest end that it has.
    """
    places = {end: place for place, ends in enumerate(questions) for end in ends}
    lengths = sorted({len(end) for end in places}, reverse=True)

    def asked_by(prompt: Sequence[int]) -> int | None:
        found = (places.get(tuple(prompt[-length:])) for length in lengths)
        return next((place for place in found if place is not None), None)

    return asked_by
