"""The kinds of a server that calibrates itself: who is recorded, who is compared, who may exit.

A step asks for each request's first token alone; the ledgers see the requests in batch order.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import SystemRandom
from threading import Lock
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.places import MOST_KINDS, MOST_RECORDED, Recent, who_goes
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.engine.admission.admitted import Admitted
from vllm_adainfer.engine.admission.threshold_rows import FULL_DEPTH
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.exits.loop.step import RecordedRequests
from vllm_adainfer.settings.engine import Auto
from vllm_adainfer.watch.ledger import Ledger

logger = get_logger(__name__)

MOST_COUNTED = 256  # kinds without a place
MOST_RETIRED = 192  # policies that may lose their place: each leaves counters that reports read
LOOK_SECONDS = 1.0  # between two looks at who might lose its place


@dataclass
class OwnKind:
    """One kind that has a place.

    Attributes:
        ledger: that of its promise.
        since: when its requests began to count, in seconds since 1970.
        recent: its requests of about the last day.
        state: "recording"; "recorded" with rows enough; then "served" or "given up".
        saved: the requests that the ledger on disk has.
        is_saved: whether the ledger on disk has all misses; no request exits otherwise.
        lock: held while the ledger is changed or read.
        writing: held while it is written, so that no older one replaces a newer one.

    """

    ledger: Ledger
    since: float = field(default_factory=time.time)
    recent: Recent = field(default_factory=Recent)
    state: str = "recording"
    saved: int = -1
    is_saved: bool = True
    lock: Lock = field(default_factory=Lock)
    writing: Lock = field(default_factory=Lock)

    @property
    def has_rows(self) -> bool:
        """Whether rows of it are kept."""
        return self.state in ("recording", "recorded")

    @property
    def is_done(self) -> bool:
        """Whether no request of it will ever exit."""
        return self.ledger.is_closed or self.state == "given up"

    def reading(self) -> dict[str, Any]:
        """What the ledger says."""
        with self.lock:
            return self._reading()

    def _reading(self) -> dict[str, Any]:
        ledger = self.ledger
        return {
            "requests": ledger.requests,
            "misses": ledger.misses,
            "changed_at_most": ledger.changed_at_most if ledger.decided else 0.0,
            "allowed": ledger.allowed,
            "rate": ledger.rate,
            "closed": ledger.is_closed,
        }

    def as_dict(self) -> dict[str, Any]:
        """The whole state of the ledger, and its reading, for a file."""
        with self.lock:
            state = {**self.ledger.as_dict(), **self._reading()}
            recent = vars(self.recent).copy()
        return {**state, "since": self.since, "delta": state["alpha"], "recent": recent}

    @classmethod
    def of_dict(cls, content: Any) -> OwnKind | None:
        """The kind that `as_dict` described; None if that is damaged."""
        ledger = Ledger.of_dict(content)
        if ledger is None:
            return None
        try:
            since, recent = float(content["since"]), content.get("recent", {})
            return cls(ledger, since, Recent(**{name: float(recent[name]) for name in recent}))
        except (LookupError, TypeError, ValueError):
            return None


class OwnKinds:
    """Decides, for each first token of a step, whether its request is recorded or may exit.

    Attributes:
        kinds: those that have a place, by name.
        closed: those of them that are closed.
        step_seconds: time of all steps so far.
        steps: their number.

    """

    def __init__(self, auto: Auto, directory: AutoDirectory) -> None:
        """Go on with the ledgers in `directory`.

        A kind whose ledger is missing or damaged begins anew, and its rows and its policy are
        deleted. What such a ledger has spent is unknown, and a policy that it had closed must not
        come back. A new ledger has earned nothing, and its promise is about requests from now on.
        """
        self._auto, self._directory = auto, directory
        self._counted: OrderedDict[str, Recent] = OrderedDict()
        self._step: dict[str, tuple[int, int]] = {}  # by kind: requests, and those decided
        self._toss = SystemRandom().random  # which no client can foresee
        self.step_seconds, self.steps = 0.0, 0
        self._started = 0.0
        self.kinds: dict[str, OwnKind] = {}
        self.closed: set[str] = set()
        self._lost: list[str] = []
        self._retired = 0
        self._next_look = 0.0
        for name in directory.known():
            own = OwnKind.of_dict(read_json(directory.ledger(name)))
            if own is None:
                logger.warning(
                    "kind %s has no readable ledger, so nobody knows what its policy has spent: it "
                    "begins anew, and its policy and its rows are deleted",
                    name,
                )
                directory.forget_kind(name)
                continue
            own.ledger.use_rate(auto.full_depth_rate)
            self.kinds[name] = own
            if own.ledger.is_closed:
                self.closed.add(name)

    def take_lost(self) -> list[str]:
        """The kinds that have lost their place since the last call; nearly always none."""
        lost, self._lost = self._lost, []
        return lost

    def gate(
        self, admitted: Sequence[Admitted], first_tokens: Ints, lens: Ints, threshold_rows: Ints
    ) -> tuple[Bools, RecordedRequests | None]:
        """Let a step's requests exit as far as the ledgers allow, and record those of new kinds.

        Args:
            admitted: the requests.
            first_tokens: places of those that yield their first token.
            lens: [requests], the rows of each.
            threshold_rows: [requests]; those that must run all layers get `FULL_DEPTH`.

        Returns:
            bool [requests], who runs all layers to be compared; and who is recorded.

        """
        self._started = time.perf_counter()
        compared = np.zeros(len(admitted), dtype=np.bool_)
        recorded: list[int] = []
        names: list[str] = []
        by_kind: dict[str, list[int]] = {}
        for place in first_tokens.tolist():
            name = admitted[place].resolved.kind
            if name is not None:
                by_kind.setdefault(name, []).append(place)
        self._step = {}
        now = time.time()
        for name, places in by_kind.items():
            own = self.kinds.get(name)
            if own is not None:
                own.recent.add(len(places), now)
            else:
                own = self._found(name, len(places), by_kind, now)
            if own is None:
                threshold_rows[places] = FULL_DEPTH
                continue
            decidable = [place for place in places if threshold_rows[place] != FULL_DEPTH]
            coins = [self._toss() < own.ledger.rate for _ in decidable]
            count = own.ledger.decidable(coins) if own.is_saved else 0
            threshold_rows[decidable[count:]] = FULL_DEPTH
            compared[decidable[:count]] = coins[:count]
            # What a policy in service does not decide, whatever a client sent, earns it no budget.
            earning = decidable if own.state == "served" else places
            if earning:
                self._step[name] = len(earning), count
            if own.state == "recording":
                new = [
                    place
                    for place in places
                    if threshold_rows[place] == FULL_DEPTH  # its policy may just have come
                    and not admitted[place].resolved.force_full_depth_prefill
                ]
                recorded += new
                names += [name] * len(new)
        if not recorded:
            return compared, None
        chosen = np.array(recorded)
        return compared, RecordedRequests(chosen, names, lens[chosen])

    def step_ended(self, misses: Mapping[str, int]) -> None:
        """Enter the step into the ledgers; `misses` are the changed answers by policy.

        A miss is on disk before its step's answers leave, and so is another rate before its first
        coin is tossed: a crash forgets neither.
        """
        if self._started:
            self.steps += 1
            self.step_seconds += time.perf_counter() - self._started
            self._started = 0.0
        step, self._step = self._step, {}
        for name, (requests, decided) in step.items():
            own, missed = self.kinds[name], misses.get(name, 0)
            with own.lock:
                was_closed, rate = own.ledger.is_closed, own.ledger.rate
                opens = decided > 0 and not own.ledger.decided
                own.ledger.add(requests, decided, missed)
            if missed or own.ledger.rate != rate:
                self.save(name)
            if opens:
                logger.info("kind %s is open: from now on its requests may exit", name)
                self._directory.tell(name, "opened", requests=own.ledger.requests)
            if own.ledger.is_closed and not was_closed:
                self.closed.add(name)
                self._tell_closed(name, own.ledger)
            elif own.ledger.rate != rate:
                logger.info(
                    "kind %s: from now on %g of its requests run all layers to be compared, not %g",
                    name,
                    own.ledger.rate,
                    rate,
                )

    def save(self, name: str) -> None:
        """Write the ledger of a kind if it has changed; until that works, nobody exits."""
        own = self.kinds.get(name)
        if own is None or (own.is_saved and own.saved == own.ledger.requests):
            return
        try:
            with own.writing:
                content = own.as_dict()
                write_json(self._directory.ledger(name), content)
                own.is_saved, own.saved = True, content["requests"]
        except OSError as error:
            if own.is_saved:
                logger.warning(
                    "kind %s: its ledger cannot be written (%s), so its requests run at full depth "
                    "until it can",
                    name,
                    error,
                )
            own.is_saved = False

    def _found(
        self, name: str, requests: int, step: Mapping[str, Any], now: float
    ) -> OwnKind | None:
        """Count requests of a kind without a place; the kind itself once it gets one."""
        recent = self._counted.pop(name, None) or Recent()
        recent.add(requests, now)
        if round(recent.requests) >= RECURS and self._has_room(recent.requests, step, now):
            auto = self._auto
            ledger = Ledger(auto.epsilon, auto.delta, auto.full_depth_rate)
            self.kinds[name] = OwnKind(ledger, now, recent)
            logger.info("kind %s recurs: its requests are recorded from now on", name)
            self._directory.tell(name, "recording")
            return self.kinds[name]
        self._counted[name] = recent
        if len(self._counted) > MOST_COUNTED:
            self._counted.popitem(last=False)
        return None

    def _has_room(self, wants: float, step: Mapping[str, Any], now: float) -> bool:
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
        self.closed.discard(name)
        self._lost.append(name)
        logger.info("kind %s loses its place to one that comes more often", name)
        self._directory.tell(name, "lost its place")
        return True

    def _tell_closed(self, name: str, ledger: Ledger) -> None:
        logger.warning(
            "kind %s is closed, its requests run at full depth from now on: %s",
            name,
            ledger.why_closed,
        )
        self._directory.tell(name, "closed", requests=ledger.requests, why=ledger.why_closed)
