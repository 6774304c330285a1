"""Questions of one kind, told apart by how their prompts end.

Prompts that end with one of a few questions are several kinds: each has heads, a ledger and a
promise of its own. As each ledger begins anew, a kind is divided only once many requests came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_adainfer.auto.kinds import Kind

WIDTHS = range(4, 65, 4)  # tokens at the end of a prompt that may tell questions apart
MOST_QUESTIONS = 16
ASKED = 20_000  # requests of a kind, before it is divided
SHARE = 0.1  # of these, that a question must have


@dataclass(frozen=True)
class Questions:
    """The questions that a kind is divided into.

    Attributes:
        width: how many tokens at the end of a prompt tell them apart.
        endings: these tokens, of each question.

    """

    width: int
    endings: frozenset[tuple[int, ...]]

    def kind_of(self, kind: Kind, prompt: Sequence[int]) -> Kind:
        """The kind of a request with this prompt; `kind` itself if it asks none of them."""
        ending = tuple(prompt[-self.width :])
        return replace(kind, ending=ending) if ending in self.endings else kind

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"width": self.width, "endings": [*map(list, self.endings)]}

    @classmethod
    def of_dict(cls, fields: Mapping[str, Any]) -> Questions:
        """What `as_dict` described; a KeyError, TypeError or ValueError if that is damaged."""
        endings = (tuple(map(int, ending)) for ending in fields["endings"])
        return cls(int(fields["width"]), frozenset(endings))


class Endings:
    """Counts how the prompts of a kind end, by as many tokens as say something.

    A width at which more than `MOST_QUESTIONS` endings were seen is given up: texts differ there.
    So few endings are kept, whatever comes.
    """

    def __init__(self) -> None:
        """Begin without a prompt."""
        self._requests = 0
        self._counts: dict[int, Counter[tuple[int, ...]]] = {width: Counter() for width in WIDTHS}

    def add(self, prompt: Sequence[int]) -> None:
        """Count a prompt."""
        self._requests += 1
        for width, counts in [*self._counts.items()]:
            counts[tuple(prompt[-width:])] += 1
            if len(counts) > MOST_QUESTIONS:
                del self._counts[width]

    def found(self) -> Questions | None:
        """The questions, once enough came; None if there are none, or only one."""
        if self._requests < ASKED:
            return None
        for width, counts in sorted(self._counts.items(), reverse=True):
            least = SHARE * self._requests
            often = [ending for ending, count in counts.items() if count >= least]
            if len(often) > 1:
                return Questions(width, frozenset(often))
        return None
