"""One claim over all kinds of a server, from the ledgers of each.

For each c, the product of the kinds' martingales is a martingale (see `watch.ledger`): they are
about different requests. So the bounds of all kinds, without what each begins with, add up to what
one ledger over all requests would have, which begins once. Of ten kinds at 90 %, one may be beyond
its bound; the claim over all holds with 90 %, and is smaller than the sum of their claims.

A kind that loses its place leaves what it has counted to a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.watch.ledger import GRID, first_bounds


@dataclass(frozen=True)
class Counted:
    """What ledgers have counted together.

    Attributes:
        kinds: how many kinds.
        requests: all their requests.
        beyond: by c, their bounds without what each began with; infinite where one has given up c.

    """

    kinds: int = 0
    requests: int = 0
    beyond: tuple[float, ...] = field(default=(0.0,) * len(GRID))

    def __add__(self, other: Counted) -> Counted:
        """Both together."""
        pairs = zip(self.beyond, other.beyond, strict=True)
        kinds, requests = self.kinds + other.kinds, self.requests + other.requests
        return Counted(kinds, requests, tuple(one + another for one, another in pairs))

    def changed_at_most(self, alpha: float) -> float | None:
        """With confidence 1 - `alpha`, so many answers were changed; None if nobody knows."""
        pairs = zip(first_bounds(alpha), self.beyond, strict=True)
        least = min(first + own for first, own in pairs)
        return least if least < math.inf else None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        beyond = [one if one < math.inf else None for one in self.beyond]
        return {**asdict(self), "beyond": beyond}

    @classmethod
    def of_file(cls, content: Any) -> Counted:
        """What `as_dict` described; `UNKNOWN` if that is damaged."""
        try:
            beyond = tuple(math.inf if one is None else float(one) for one in content["beyond"])
            found = cls(int(content["kinds"]), int(content["requests"]), beyond)
        except (KeyError, TypeError, ValueError):
            return UNKNOWN
        return found if len(beyond) == len(GRID) else UNKNOWN

    @classmethod
    def of_ledger(cls, content: Any) -> Counted:
        """What a ledger's file has counted; `UNKNOWN` if it is damaged."""
        try:
            firsts = first_bounds(float(content["alpha"]))
            bounds = [math.inf if one is None else float(one) for one in content["bounds"]]
            pairs = zip(bounds, firsts, strict=True)
            beyond = tuple(max(0.0, bound - first) for bound, first in pairs)
            return cls(1, int(content["requests"]), beyond)
        except (KeyError, TypeError, ValueError):
            return UNKNOWN


UNKNOWN = Counted(1, 0, (math.inf,) * len(GRID))  # of a kind whose ledger was damaged


def together(counted: Iterable[Counted]) -> Counted:
    """All of them."""
    return sum(counted, Counted())


def lost_of(directory: AutoDirectory) -> Counted:
    """What kinds without a place have counted."""
    if not directory.lost.exists():
        return Counted()
    return Counted.of_file(read_json(directory.lost))


def note_lost(directory: AutoDirectory, counted: Counted) -> None:
    """Write down what a kind has counted before its files go; an OSError if that fails."""
    write_json(directory.lost, (lost_of(directory) + counted).as_dict())
