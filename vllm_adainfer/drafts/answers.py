"""A language model of the answers to one grammar: what the model wrote before, it will write again.

It counts which token followed the last few tokens, for several numbers of these, and mixes the
counts by Witten and Bell's method X ("The zero-frequency problem", 1991): a context trusts its own
counts the more, the fewer tokens followed it only once. So the skeleton of an object is sure after
a few answers, a value has the share that it had, and free text is never sure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import islice

ORDERS = (1, 2, 4, 8)  # numbers of tokens that a context has
LONGEST_CONTEXT = ORDERS[-1]
START = (-1,) * LONGEST_CONTEXT  # what comes before an answer
MOST_CONTEXTS = 1792  # of one grammar; at most 1 MiB with what follows them
MOST_NEXT = 10  # tokens counted after one context; the others count as unforeseen
MOST_COUNTED = 256  # times that a context came; from there on, what is older counts less
HALF = 0.5  # of a token is always unforeseen
VALUES, FORESEEN = 3, 3  # next tokens, and tokens behind each, that `behind_next` looks at


@dataclass(slots=True)
class Followers:
    """What followed one context: how many tokens, how many of them once, and which how often."""

    total: int = 0
    once: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, token: int) -> None:
        """Count one more token."""
        if self.total == MOST_COUNTED:
            self.counts = {one: count // 2 for one, count in self.counts.items() if count > 1}
            self.total = sum(self.counts.values())
            self.once = sum(count == 1 for count in self.counts.values())
        self.total += 1
        seen = self.counts.get(token, 0)
        if seen or len(self.counts) < MOST_NEXT:
            self.counts[token] = seen + 1
        if seen == 1:
            self.once -= 1
        elif not seen:
            self.once += 1


class Answers:
    """The answers to one grammar, in one tokenizer's tokens. Bounded in memory and in time."""

    def __init__(self) -> None:
        self._followers: dict[int, Followers] = {}

    def add(self, before: Sequence[int], token: int) -> None:
        """Count `token`, which followed `before`: the last `LONGEST_CONTEXT` tokens, or `START`."""
        if len(self._followers) > MOST_CONTEXTS - len(ORDERS):
            self._forget()
        for key in _contexts(before):
            self._followers.setdefault(key, Followers()).add(token)

    def draft(self, before: Sequence[int], least: float, longest: int, end: int) -> list[int]:
        """What probably follows `before`, without the `end` token, up to `longest` tokens.

        Each is expected to be kept, with all that come before it, with probability `least` or more.
        """
        drafted: list[int] = []
        sure = 1.0
        for token, probability in islice(self._likeliest(before), longest):
            sure *= probability
            if token == end or sure < least:
                break
            drafted.append(token)
        return drafted

    def behind_next(self, before: Sequence[int], end: int) -> float:
        """How many tokens would be kept of a short draft behind the next token, once it is known.

        An expectation over the likeliest next tokens: whichever value is written, an object goes on
        in much the same way. Most free text goes on with what was not seen before.
        """
        known = self._known(before)
        counts = known[-1].counts if known else {}
        expected = 0.0
        for token in nlargest(VALUES, counts, key=counts.__getitem__):
            if token != end:
                window = *before[1:], token
                expected += _probability(known, token) * self._kept_after(window, end)
        return expected

    def _kept_after(self, before: Sequence[int], end: int) -> float:
        kept, sure = 0.0, 1.0
        for token, probability in islice(self._likeliest(before), FORESEEN):
            if token == end:
                break
            sure *= probability
            kept += sure
        return kept

    def _likeliest(self, before: Sequence[int]) -> Iterator[tuple[int, float]]:
        """The likeliest tokens after `before`, and the probability of each after those.

        It ends where nothing is known.
        """
        window = tuple(before)
        while (found := self._next(window))[1]:
            token, probability = found
            yield token, probability
            window = (*window[1:], token)

    def _next(self, before: Sequence[int]) -> tuple[int, float]:
        """The likeliest next token, and its probability; 0 if nothing is known."""
        known = self._known(before)
        if not known:
            return -1, 0.0
        likeliest = max(known[-1].counts, key=known[-1].counts.__getitem__)
        return likeliest, _probability(known, likeliest)

    def _known(self, before: Sequence[int]) -> list[Followers]:
        """What followed the contexts at the end of `before`, that of the longest last."""
        return [
            found for key in _contexts(before) if (found := self._followers.get(key)) is not None
        ]

    def _forget(self) -> None:
        """Forget the rarest contexts: what came once goes, what keeps coming stays."""
        rare = 1
        while len(self._followers) > MOST_CONTEXTS // 2:
            self._followers = {key: one for key, one in self._followers.items() if one.total > rare}
            rare *= 2


def _probability(known: Sequence[Followers], token: int) -> float:
    """That of `token` after the contexts of `known`, as said above.

    A longer context that came as often as a shorter one came at the same places, and says no more.
    """
    probability, total = 0.0, 0
    for one in known:
        if one.total != total:
            unforeseen, total = one.once + HALF, one.total
            seen = one.counts.get(token, 0)
            probability = (seen + unforeseen * probability) / (total + unforeseen)
    return probability


def _contexts(before: Sequence[int]) -> list[int]:
    """A key for each context at the end of `before`, the shortest first.

    Two contexts with one key would only cost a refused draft.
    """
    return [hash(tuple(before[-order:])) for order in ORDERS]
