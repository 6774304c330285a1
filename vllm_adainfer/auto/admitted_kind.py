"""One kind that has a place in a server that calibrates itself, and the file of its ledger."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from vllm_adainfer.auto.directory import read_json, write_json
from vllm_adainfer.watch.ledger import Ledger

logger = logging.getLogger("vllm.adainfer.auto")  # vLLM shows only loggers under "vllm."

DAY = 86400.0  # seconds
RESERVED = 2  # misses for which a file allows ahead
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
        state: "recording"; "recorded" with rows enough; then "served" or "given up".
        certified: number of the policy to serve; None for none.
        quarantined: the policy that cannot be served, and why; empty for none.
        content: what its file should say since the last step.
        is_saved: whether the file could be written; no request exits otherwise.

    """

    name: str
    ledger: Ledger
    since: float = field(default_factory=time.time)
    recent: Recent = field(default_factory=Recent)
    state: str = "recording"
    certified: int | None = None
    quarantined: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, Any] = field(init=False)
    is_saved: bool = True
    _written: tuple[Any, Any] = (None, None)  # `content` and `quarantined` as the file has them
    _allowed_for: int = 0  # misses that the file has or allows for; -1 while it is written
    _writing: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        """A thread may write the file before the first step of the kind has ended."""
        self.note()

    @property
    def is_done(self) -> bool:
        """Whether no request of it will ever exit."""
        return self.ledger.is_closed or self.state == "given up"

    @property
    def reading(self) -> dict[str, Any]:
        """The state of the ledger, for people."""
        return {name: self.content[name] for name in SHOWN}

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
        except (LookupError, TypeError, ValueError):
            return None
        quarantined = content.get("quarantined") or {}
        found = cls(name, ledger, since, recent, quarantined=quarantined)
        found._written, found._allowed_for = (found.content, quarantined), ledger.misses
        return found
