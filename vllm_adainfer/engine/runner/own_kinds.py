"""The kinds of a server that calibrates itself: who is recorded, who is compared, who may exit.

A step asks for each request's first token alone; the ledgers see the requests in batch order.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import SystemRandom
from threading import Lock
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.ledger import Ledger
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.engine.admission.admitted import Admitted
from vllm_adainfer.engine.admission.threshold_rows import FULL_DEPTH
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.exits.loop.step import RecordedRequests
from vllm_adainfer.settings.engine import Auto

logger = get_logger(__name__)

MOST_RECORDED = 8  # kinds at a time
MOST_KINDS = 64  # that recur
MOST_COUNTED = 256  # kinds that have not recurred yet
HOUR = 3600.0  # seconds; a recorded kind that recurs in none of them may lose its place


@dataclass
class OwnKind:
    """One kind that recurs.

    Attributes:
        ledger: that of its promise.
        since: when its requests began to count, in seconds since 1970.
        state: "recording" until it has a policy, or rows enough.
        saved: the requests that the ledger on disk has.
        is_saved: whether the ledger on disk has all misses; no request exits otherwise.
        lock: held while the ledger is changed or read.
        writing: held while it is written, so that no older one replaces a newer one.

    """

    ledger: Ledger
    since: float = field(default_factory=time.time)
    state: str = "recording"
    saved: int = -1
    is_saved: bool = True
    lock: Lock = field(default_factory=Lock)
    writing: Lock = field(default_factory=Lock)

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
        return {**state, "since": self.since, "delta": state["alpha"]}


class OwnKinds:
    """Decides, for each first token of a step, whether its request is recorded or may exit.

    Attributes:
        kinds: those that recur, by name.
        closed: those of them that are closed for good.
        step_seconds: time of all steps so far.
        steps: their number.

    """

    def __init__(self, auto: Auto, directory: AutoDirectory) -> None:
        """Go on with the ledgers in `directory`."""
        self._auto, self._directory = auto, directory
        self._counted: OrderedDict[str, int] = OrderedDict()
        self._step: dict[str, tuple[int, int]] = {}  # by kind: requests, and those decided
        self._toss = SystemRandom().random  # which no client can foresee
        self.step_seconds, self.steps = 0.0, 0
        self._started = 0.0
        self.kinds: dict[str, OwnKind] = {}
        self.closed: set[str] = set()
        for path in directory.root.glob("*/ledger.json"):
            content = read_json(path)
            ledger = Ledger.of_dict(content)
            if ledger is None:
                continue
            ledger.use_rate(auto.full_depth_rate)
            since = float(content.get("since", time.time()))
            self.kinds[path.parent.name] = OwnKind(ledger, since)
            if ledger.is_closed:
                self.closed.add(path.parent.name)

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
        for name, places in by_kind.items():
            own = self.kinds.get(name) or self._found(name, len(places))
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
                self._tell(name, "opened", requests=own.ledger.requests)
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

    def _found(self, name: str, requests: int) -> OwnKind | None:
        """Count requests of a kind that is not recorded; the kind itself once it is."""
        count = self._counted.pop(name, 0) + requests
        if count >= RECURS and len(self.kinds) < MOST_KINDS and self._has_room():
            self.kinds[name] = OwnKind(
                Ledger(self._auto.epsilon, self._auto.delta, self._auto.full_depth_rate)
            )
            logger.info("kind %s recurs: its requests are recorded from now on", name)
            self._tell(name, "recording")
            return self.kinds[name]
        self._counted[name] = count
        if len(self._counted) > MOST_COUNTED:
            self._counted.popitem(last=False)
        return None

    def _has_room(self) -> bool:
        """Whether one more kind may be recorded; one that comes too seldom makes room."""
        recording = {n: own for n, own in self.kinds.items() if own.state == "recording"}
        if len(recording) < MOST_RECORDED:
            return True
        for name, own in recording.items():
            hours = (time.time() - own.since) / HOUR
            if name not in self._step and hours > 1 and own.ledger.requests < RECURS * hours:
                del self.kinds[name]
                return True
        return False

    def _tell_closed(self, name: str, ledger: Ledger) -> None:
        logger.warning(
            "kind %s is closed, its requests run at full depth from now on: %s",
            name,
            ledger.why_closed,
        )
        self._tell(name, "closed", requests=ledger.requests, why=ledger.why_closed)

    def _tell(self, name: str, event: str, **facts: Any) -> None:
        with suppress(OSError):  # a full disk must not stop a step
            self._directory.tell(name, event, **facts)
