"""The kinds of a server that calibrates itself: who is recorded, who is compared, who may exit.

A step asks for each request's first token alone; the ledgers see the requests in batch order.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import SystemRandom

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.auto.own_kind import OwnKind
from vllm_adainfer.auto.places import Places
from vllm_adainfer.engine.admission.running import Running
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.exits.loop.step import FULL_DEPTH, RecordedRequests
from vllm_adainfer.settings.engine import Auto
from vllm_adainfer.watch.ledger import Ledger

logger = get_logger(__name__)


class OwnKinds:
    """Decides, for each first token of a step, whether its request is recorded or may exit.

    Attributes:
        places: the kinds that have a place.
        kinds: those, by name.
        step_seconds: time of all steps so far.
        steps: their number.

    """

    def __init__(self, auto: Auto, directory: AutoDirectory) -> None:
        """Go on with the ledgers in `directory`, see `Places`."""
        self._directory = directory

        def new_ledger() -> Ledger:
            return Ledger(auto.epsilon, auto.delta, auto.full_depth_rate)

        self.places = Places(directory, new_ledger)
        self.kinds = self.places.kinds
        for name, own in self.kinds.items():
            if own.ledger.rates[0] != auto.full_depth_rate:
                own.ledger.use_rate(auto.full_depth_rate)
                own.note()
                own.save(directory.ledger(name))  # before its first coin is tossed
        self._step: dict[str, tuple[int, int]] = {}  # by kind: requests, and those decided
        self._toss = SystemRandom().random  # which no client can foresee
        self.step_seconds, self.steps = 0.0, 0
        self._started = 0.0

    @property
    def closed(self) -> list[str]:
        """The kinds whose requests run at full depth for good."""
        return [name for name, own in self.kinds.items() if own.ledger.is_closed]

    def admit_by_ledger(
        self, requests: Sequence[Running], first_tokens: Ints, lens: Ints, threshold_rows: Ints
    ) -> tuple[Bools, RecordedRequests | None]:
        """Let a step's requests exit as far as the ledgers allow, and record those of new kinds.

        Args:
            requests: those of the step.
            first_tokens: places of those that yield their first token.
            lens: [requests], the rows of each.
            threshold_rows: [requests]; those that must run all layers get `FULL_DEPTH`.

        Returns:
            bool [requests], who runs all layers to be compared; and who is recorded.

        """
        self._started = time.perf_counter()
        compared = np.zeros(len(requests), dtype=np.bool_)
        recorded: list[tuple[int, str]] = []
        by_kind: defaultdict[str, list[int]] = defaultdict(list)
        for place in first_tokens.tolist():
            name = requests[place].kind
            if name is not None:
                by_kind[name].append(place)
        self._step = {}
        now = time.time()
        for name, places in by_kind.items():
            own = self.places.find(name, len(places), by_kind, now)
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
                recorded += [
                    (place, name)
                    for place in places
                    if threshold_rows[place] == FULL_DEPTH  # its policy may just have come
                    and not requests[place].force_full_depth_prefill
                ]
        if not recorded:
            return compared, None
        chosen = np.array([place for place, _ in recorded])
        return compared, RecordedRequests(chosen, [name for _, name in recorded], lens[chosen])

    def step_ended(self, misses: Mapping[str, int]) -> None:
        """Enter the step into the ledgers; `misses` are the changed answers by policy."""
        if self._started:
            self.steps += 1
            self.step_seconds += time.perf_counter() - self._started
            self._started = 0.0
        step, self._step = self._step, {}
        for name, (requests, decided) in step.items():
            self._add(self.kinds[name], requests, decided, misses.get(name, 0))

    def save(self, is_last: bool = False) -> None:
        """Write the ledgers that have changed; `is_last`: no step will follow."""
        for name, own in list(self.kinds.items()):
            own.save(self._directory.ledger(name), reserves=not is_last)

    def _add(self, own: OwnKind, requests: int, decided: int, misses: int) -> None:
        """Enter requests into a ledger, and tell people what follows."""
        name, ledger = own.name, own.ledger
        was_closed, rate, opens = ledger.is_closed, ledger.rate, decided and not ledger.decided
        own.add(requests, decided, misses, self._directory.ledger(name))
        if opens:
            logger.info("kind %s is open: from now on its requests may exit", name)
            self._directory.tell(name, "opened", requests=ledger.requests)
        if ledger.is_closed and not was_closed:
            logger.warning(
                "kind %s is closed, its requests run at full depth from now on: %s",
                name,
                ledger.why_closed,
            )
            self._directory.tell(name, "closed", requests=ledger.requests, why=ledger.why_closed)
        elif ledger.rate != rate:
            logger.info(
                "kind %s: from now on %g of its requests run all layers to be compared, not %g",
                name,
                ledger.rate,
                rate,
            )
