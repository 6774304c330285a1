"""Places for kinds: few are calibrated at a time, and none keeps its place without requests.

A kind that comes more often takes the place of one that comes less often. So whoever wants to hold
all places must send requests for ever, more than the kinds that it keeps out.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping

from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.auto.own_kind import OwnKind, Recent
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.auto.tries import MOST_ROWS
from vllm_adainfer.watch.ledger import Ledger

logger = logging.getLogger("vllm.adainfer.auto.places")  # vLLM shows only loggers under "vllm."

MOST_KINDS = 64  # that have a ledger
MOST_RECORDED = 8  # of these, whose rows are kept
MOST_KEPT_ROWS = MOST_RECORDED * MOST_ROWS
MOST_COUNTED = 256  # kinds without a place
MOST_RETIRED = 192  # policies that may lose their place: each leaves counters that reports read
YOUNG_SECONDS = 3600.0  # for which a kind has its place for sure
LOOK_SECONDS = 1.0  # between two looks at who might lose its place
OFTENER = 2  # so many times as often comes a kind that takes another one's place


class Places:
    """The kinds that have a place, and counts of those that may get one.

    Attributes:
        kinds: those that have a place, by name.

    """

    def __init__(self, directory: AutoDirectory, new_ledger: Callable[[], Ledger]) -> None:
        """Go on with the ledgers in `directory`; kinds that get a place have a `new_ledger`.

        A kind whose ledger is missing or damaged begins anew, and its rows and its policy are
        deleted. What such a ledger has spent is unknown, and a policy that it had closed must not
        come back. A new ledger has earned nothing, and its promise is about requests from now on.
        """
        self._directory, self._new_ledger = directory, new_ledger
        self._counted: OrderedDict[str, Recent] = OrderedDict()
        self._lost: list[str] = []
        self._retired = 0
        self._next_look = 0.0
        self.kinds: dict[str, OwnKind] = {}
        for name in directory.known():
            own = OwnKind.read(name, directory.ledger(name))
            if own is not None:
                self.kinds[name] = own
                continue
            logger.warning(
                "kind %s has no readable ledger, so nobody knows what its policy has spent: it "
                "begins anew, and its policy and its rows are deleted",
                name,
            )
            directory.forget_kind(name)

    def take_lost(self) -> list[str]:
        """The kinds that have lost their place since the last call; nearly always none."""
        lost, self._lost = self._lost, []
        return lost

    def find(self, name: str, requests: int, step: Container[str], now: float) -> OwnKind | None:
        """The kind of requests that have just come; None if it has no place and gets none.

        Args:
            name: the kind.
            requests: how many of them came.
            step: all kinds of this step, which keep their places.
            now: the time in seconds since 1970.

        """
        if (own := self.kinds.get(name)) is not None:
            own.recent.add(requests, now)
            return own
        recent = self._counted.pop(name, None) or Recent()
        recent.add(requests, now)
        if round(recent.requests) >= RECURS and self._has_room(recent.requests, step, now):
            self.kinds[name] = OwnKind(name, self._new_ledger(), now, recent)
            logger.info("kind %s recurs: its requests are recorded from now on", name)
            self._directory.tell(name, "recording")
            return self.kinds[name]
        self._counted[name] = recent
        if len(self._counted) > MOST_COUNTED:
            self._counted.popitem(last=False)
        return None

    def _has_room(self, wants: float, step: Container[str], now: float) -> bool:
        """Whether one more kind may be recorded; see `who_goes` for who makes room for it."""
        holders = {name: own for name, own in self.kinds.items() if own.has_rows}
        if len(holders) < MOST_RECORDED:
            if len(self.kinds) < MOST_KINDS:
                return True
            holders = self.kinds
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        may_go = {
            name: own
            for name, own in holders.items()
            if name not in step and (own.state != "served" or self._retired < MOST_RETIRED)
        }
        name = who_goes(may_go, wants, now)
        if name is None:
            return False
        self._retired += self.kinds.pop(name).state == "served"
        self._lost.append(name)
        logger.info("kind %s loses its place to one that comes more often", name)
        self._directory.tell(name, "lost its place")
        return True


def who_goes(holders: Mapping[str, OwnKind], wants: float, now: float) -> str | None:
    """The kind that loses its place to one with `wants` recent requests; None if none does.

    Of the kinds that are done, or else of all that have had a place for a while, it is the one with
    the fewest recent requests.
    """
    recent = {name: one.recent.at(now) for name, one in holders.items()}
    if done := [name for name, one in holders.items() if one.is_done]:
        return min(done, key=recent.__getitem__)
    old = [name for name, one in holders.items() if now - one.since >= YOUNG_SECONDS]
    least = min(old, key=recent.__getitem__, default=None)
    return least if least is not None and wants >= OFTENER * recent[least] else None
