"""Places for kinds: few are calibrated at a time, and none keeps its place without requests.

A kind that comes more often takes the place of one that comes less often. So whoever wants to hold
all places must send requests for ever, more than the kinds that it keeps out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vllm_adainfer.auto.tries import MOST_ROWS

MOST_KINDS = 64  # that have a ledger
MOST_RECORDED = 8  # of these, whose rows are kept
MOST_KEPT_ROWS = MOST_RECORDED * MOST_ROWS
DAY = 86400.0  # seconds
YOUNG_SECONDS = 3600.0  # for which a kind has its place for sure
OFTENER = 2  # so many times as often comes a kind that takes another one's place


@dataclass
class Recent:
    """Requests of about the last day: one that came t days ago counts as e^-t.

    Attributes:
        requests: as they counted when the last came.
        last: when that was, in seconds since 1970.

    """

    requests: float = 0.0
    last: float = field(default_factory=time.time)

    def at(self, now: float) -> float:
        """The requests as they count now."""
        return self.requests * math.exp(min(0.0, self.last - now) / DAY)

    def add(self, requests: int, now: float) -> None:
        """Count requests that came now."""
        self.requests, self.last = self.at(now) + requests, now


class Holder(Protocol):
    """A kind that has a place.

    Attributes:
        recent: its requests.
        since: when it got the place, in seconds since 1970.

    """

    recent: Recent
    since: float

    @property
    def is_done(self) -> bool:
        """Whether no request of it will ever exit."""


def who_goes(holders: Mapping[str, Holder], wants: float, now: float) -> str | None:
    """Who loses its place to a kind with `wants` recent requests; None if nobody does.

    Of the kinds that are done, or else of all that have had a place for a while, it is the one with
    the fewest recent requests.
    """
    recent = {name: one.recent.at(now) for name, one in holders.items()}
    if done := [name for name, one in holders.items() if one.is_done]:
        return min(done, key=recent.__getitem__)
    old = [name for name, one in holders.items() if now - one.since >= YOUNG_SECONDS]
    least = min(old, key=recent.__getitem__, default=None)
    return least if least is not None and wants >= OFTENER * recent[least] else None
