"""One kind that has a place in a server that calibrates itself, and the file of its ledger."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from vllm_adainfer.auto.beginning import PROMPTS, Beginning
from vllm_adainfer.auto.directory import read_json, write_json
from vllm_adainfer.watch.ledger import Ledger

logger = logging.getLogger("vllm.adainfer.auto")  # vLLM shows only loggers under "vllm."

DAY = 86400.0  # seconds
RESERVED = 2  # misses for which a file allows ahead
AGAIN = 2_000  # requests that a course waits for, doubled with each course; the first does not wait
COURSE = ("weights", "pooled_from", "course", "begins_at", "has_grown")
SHOWN = ("requests", "misses", "changed_at_most", "allowed", "rate", "closed")


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


@dataclass
class AdmittedKind:
    """One kind that has a place.

    A miss is on disk before its step's answers leave, and yet a step hardly ever writes: the file
    allows for some misses that have not happened yet. After a crash they count as if they had.

    Attributes:
        name: the kind's name.
        ledger: that of its promise; steps alone change it.
        since: when its requests began to count, in seconds since 1970.
        recent: its requests of about the last day.
        weights: the fingerprint of its adapter's weights; None for the base model.
        pooled_from: the position from which on whole prompts are read, see `Beginning`; None
            before it is known.
        course: how often it has been recorded anew, see `auto.tries`.
        wants_course: whether it is to be recorded anew although nothing closed it.
        begins_at: its requests from which on the rows of this course are recorded.
        has_grown: whether it gave up its rows for a kind without a policy.
        state: "recording"; "recorded" with rows enough; then "served", "given up" or "closed".
        records: whether rows are recorded, also beside serving.
        certified: number of the policy to serve; None for none.
        quarantined: the policy that cannot be served, and why; empty for none.
        content: what its file should say since the last step.
        is_saved: whether the file could be written; no request exits otherwise.

    """

    name: str
    ledger: Ledger
    since: float = field(default_factory=time.time)
    recent: Recent = field(default_factory=Recent)
    weights: str | None = None
    pooled_from: int | None = None
    course: int = 0
    begins_at: int = 0
    wants_course: bool = field(default=False, kw_only=True)
    has_grown: bool = False
    state: str = "recording"
    records: bool = True
    certified: int | None = None
    quarantined: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, Any] = field(init=False)
    is_saved: bool = True
    _written: tuple[Any, Any] = (None, None)  # `content` and `quarantined` as the file has them
    _allowed_for: int = 0  # misses that the file has or allows for; -1 while it is written
    _writing: Lock = field(default_factory=Lock)
    _beginning: Beginning = field(default_factory=Beginning)
    _prompts: deque[Sequence[int]] = field(default_factory=partial(deque, maxlen=PROMPTS))

    def __post_init__(self) -> None:
        """A thread may write the file before the first step of the kind has ended."""
        self.note()

    @property
    def is_done(self) -> bool:
        """Whether no request of it exits now."""
        return self.ledger.is_closed or self.state == "given up"

    @property
    def keeps_rows(self) -> bool:
        """Whether its rows are kept, for a try to come."""
        return self.records or self.state == "recorded"

    @property
    def reading(self) -> dict[str, Any]:
        """The state of the ledger, for people."""
        return {name: self.content[name] for name in SHOWN}

    def see(self, prompt: Sequence[int]) -> None:
        """Note the prompt of a request that is recorded, for `look_at_prompts`."""
        if self.pooled_from is None:
            self._prompts.append(prompt)

    def look_at_prompts(self) -> None:
        """Find out what prompts begin with; for the thread beside the steps."""
        while self._prompts:
            self._beginning.see(self._prompts.popleft())
            self.pooled_from = self._beginning.pooled_from

    def use_weights(self, weights: str | None) -> None:
        """Its requests come under these weights of their adapter: others begin a course."""
        if weights == self.weights:
            return
        if self.weights is not None:
            self.begin_course()
        self.weights = weights
        self.note()

    def begin_course(self) -> None:
        """Record it anew: at once for the first time, then after more and more requests."""
        wait = AGAIN * 2**self.course if self.course else 0
        self.course, self.begins_at = self.course + 1, self.ledger.requests + wait
        self.has_grown = self.wants_course = False
        self.note()

    def add(self, requests: int, decided: int, misses: int, path: Path) -> None:
        """Enter a step into the ledger, whose file is `path`; see `Ledger.add`.

        Another rate is on disk before its first coin is tossed.
        """
        rate = self.ledger.rate
        self.ledger.add(requests, decided, misses)
        self.note()
        # In this order: what a thread that writes meanwhile took is then known not to be enough.
        if self.ledger.rate != rate or (misses and self.ledger.misses > self._allowed_for):
            self.save(path)

    def note(self) -> None:
        """Note what the file should say; for steps alone, which change the ledger."""
        own = {"since": self.since, "recent": vars(self.recent).copy()}
        own |= {name: getattr(self, name) for name in COURSE}
        self.content = {**self.ledger.as_dict(self.ledger.spare(RESERVED)), **own}

    def save(self, path: Path, reserves: bool = True) -> None:
        """Write the file if it is to say something else; until that works, nobody exits.

        Without `reserves` it allows for no further miss, as no step will follow.
        """
        try:
            with self._writing:
                content, quarantined = now = self.content, self.quarantined
                if reserves and all(map(operator.is_, now, self._written)):
                    return
                self._allowed_for = -1
                reserved = content["reserved"] if reserves else 0
                write_json(path, {**content, "reserved": reserved, "quarantined": quarantined})
                self._written, self._allowed_for = now, content["misses"] + reserved
                self.is_saved = True
        except OSError as error:
            if self.is_saved:
                logger.warning(
                    "kind %s: its ledger cannot be written (%s), so its requests run at full depth "
                    "until it can",
                    self.name,
                    error,
                )
            self.is_saved = False

    @classmethod
    def read(cls, name: str, path: Path) -> AdmittedKind | None:
        """The kind that a file describes; None if that is missing or damaged."""
        content = read_json(path)
        ledger = Ledger.of_dict(content)
        if ledger is None:
            return None
        try:
            since, recent = float(content["since"]), content.get("recent", {})
            recent = Recent(**{key: float(recent[key]) for key in recent})
            weights = content.get("weights")
            weights = None if weights is None else str(weights)
            pooled_from = content.get("pooled_from")
            pooled_from = None if pooled_from is None else int(pooled_from)
            course, begins_at = (int(content.get(key, 0)) for key in ("course", "begins_at"))
        except (LookupError, TypeError, ValueError):
            return None
        quarantined = content.get("quarantined") or {}
        has_grown = bool(content.get("has_grown"))
        own = (weights, pooled_from, course, begins_at, has_grown)
        found = cls(name, ledger, since, recent, *own, quarantined=quarantined)
        found._written, found._allowed_for = (found.content, quarantined), ledger.misses
        return found
