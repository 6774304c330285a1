"""Recognise what a prompt asks by the tokens it ends with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

End = tuple[int, ...]


class KnownQuestions:
    """The questions of a policy; a prompt asks the one with the longest end that it has."""

    def __init__(self, questions: Iterable[Iterable[End]]) -> None:
        """`questions` are the ends of the prompts of each, token ids; a question may have many."""
        self._places = {end: place for place, ends in enumerate(questions) for end in ends}
        self._lengths = sorted({len(end) for end in self._places}, reverse=True)

    def asked_by(self, prompt: Sequence[int]) -> int | None:
        """The place of the question that `prompt` asks; None if it is not known."""
        for length in self._lengths:
            place = self._places.get(tuple(prompt[-length:]))
            if place is not None:
                return place
        return None
