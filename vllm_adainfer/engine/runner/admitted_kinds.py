"""The kinds of a server that calibrates itself: who is recorded, who is compared, who may exit.

A step asks for each request's first token alone; the ledgers see the requests in batch order.

Few kinds are calibrated at a time, and none keeps its place without requests. A kind that comes
more often takes the place of one that comes less often. So whoever wants to hold all places must
send requests for ever, more than the kinds that it keeps out.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from random import SystemRandom
from typing import NamedTuple, TypeAlias

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.auto.admitted_kind import AdmittedKind, Recent
from vllm_adainfer.auto.all_kinds import UNKNOWN, Counted, lost_of, note_lost, together
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.engine.admission.running import NOT_POOLED, Running
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.exits.loop.step import FULL_DEPTH, RecordedRequests
from vllm_adainfer.settings.engine import Auto
from vllm_adainfer.watch.ledger import Ledger

logger = get_logger(__name__)

MOST_KINDS = 64  # that have a ledger
MOST_RECORDED = 8  # of these, whose rows are kept
MOST_COUNTED = 256  # kinds without a place
MOST_RETIRED = 192  # policies that may lose their place: each leaves counters that reports read
YOUNG_SECONDS = 3600.0  # for which a kind has its place for sure
LOOK_SECONDS = 1.0  # between two looks at who might lose its place
OFTENER = 2  # so many times as often comes a kind that takes another one's place

# By kind of a step: how many requests earn budget, and how many of them may be decided.
Decided: TypeAlias = Mapping[str, tuple[int, int]]


class AdmittedStep(NamedTuple):
    """What ledgers say of a step's requests, on all ranks.

    Attributes:
        threshold_rows: [requests], `FULL_DEPTH` where all layers must run.
        compared: bool [requests], who runs all layers to be compared.
        recorded: who is recorded.
        pooled_from: [requests], see `AdmittedKinds.pooled_from`.

    """

    threshold_rows: Ints
    compared: Bools
    recorded: RecordedRequests | None
    pooled_from: Ints


class AdmittedKinds:
    """Decides, for each first token of a step, whether its request is recorded or may exit.

    Attributes:
        kinds: those that have a place, by name.

    """

    def __init__(self, auto: Auto, directory: AutoDirectory) -> None:
        """Go on with the ledgers in `directory`; kinds that get a place have a new one.

        A kind whose ledger is missing or damaged begins anew, and its rows and its policy are
        deleted. What such a ledger has spent is unknown, and a policy that it had closed must not
        come back. A new ledger has earned nothing, and its promise is about requests from now on.
        """
        self._auto, self._directory = auto, directory
        self._counted: OrderedDict[str, Recent] = OrderedDict()  # kinds that may get a place
        self._lost: list[AdmittedKind] = []
        self._retired = 0
        self._next_look = 0.0
        self._decided: dict[str, tuple[int, int]] = {}  # of the step that runs
        self._toss = SystemRandom().random  # which no client can foresee
        self.kinds: dict[str, AdmittedKind] = {}
        for name in directory.known():
            kind = AdmittedKind.read(name, directory.ledger(name))
            if kind is None:
                logger.warning(
                    "kind %s has no readable ledger, so nobody knows what its policy has spent: it "
                    "begins anew, and its policy and its rows are deleted",
                    name,
                )
                note_lost(directory, UNKNOWN)
                directory.forget_kind(name)
                continue
            self.kinds[name] = kind
            if kind.ledger.rates[0] != auto.full_depth_rate:
                kind.ledger.use_rate(auto.full_depth_rate)
                kind.note()
                kind.save(directory.ledger(name))  # before its first coin is tossed
        self._lost_before = lost_of(directory)

    @property
    def closed(self) -> list[str]:
        """The kinds whose policy no request may be under."""
        return [name for name, kind in self.kinds.items() if kind.ledger.is_closed]

    def came_into_service(self, names: Iterable[str]) -> None:
        """New policies serve these kinds: those that were closed are open again."""
        for name in names:
            kind = self.kinds.get(name)
            if kind is not None and kind.ledger.is_closed:
                kind.ledger.open_again()
                kind.note()
                logger.info("kind %s has a new policy: its requests may exit again", name)
                self._directory.tell(name, "opened again", requests=kind.ledger.requests)

    def pooled_from(self, requests: Sequence[Running]) -> Ints:
        """[requests], from where on prompts that may be recorded are read as a whole.

        `NOT_POOLED` for all others, and for kinds of which that is not known yet.
        """
        found = np.full(len(requests), NOT_POOLED)
        known = {
            name: kind.pooled_from
            for name, kind in self.kinds.items()
            if kind.records and kind.pooled_from is not None
        }
        for place, request in enumerate(requests if known else ()):
            start = known.get(request.kind or "", NOT_POOLED)
            found[place] = start if start < len(request.prompt) else NOT_POOLED
        return found

    def claims(self) -> tuple[dict[str, float], float | None]:
        """The most changed answers of each kind that a policy has decided, and of all together.

        The latter is None if some ledger was damaged.
        """
        kinds = list(self.kinds.values())
        decided = {one.name: one.ledger.changed_at_most for one in kinds if one.ledger.decided}
        counted = together([self._lost_before, *(Counted.of_ledger(k.content) for k in kinds)])
        return decided, counted.changed_at_most(self._auto.delta)

    def take_lost(self) -> list[AdmittedKind]:
        """The kinds that have lost their place since the last call; nearly always none."""
        lost, self._lost = self._lost, []
        return lost

    def admit(
        self, requests: Sequence[Running], first_tokens: Ints, lens: Ints, threshold_rows: Ints
    ) -> AdmittedStep:
        """Let a step's requests exit as far as the ledgers allow, and record some of the others.

        Those at `first_tokens` yield their first token. `lens` [requests] are the rows of each, and
        `threshold_rows` [requests] those without a ledger.
        """
        rows = threshold_rows.copy()
        compared, recorded = self._admit(requests, first_tokens, lens, rows)
        return AdmittedStep(rows, compared, recorded, self.pooled_from(requests))

    def _admit(
        self, requests: Sequence[Running], first_tokens: Ints, lens: Ints, threshold_rows: Ints
    ) -> tuple[Bools, RecordedRequests | None]:
        """Who is compared, bool [requests], and who is recorded; changes `threshold_rows`."""
        compared = np.zeros(len(requests), dtype=np.bool_)
        recorded: list[tuple[int, str]] = []
        by_kind: defaultdict[str, list[int]] = defaultdict(list)
        for place in first_tokens.tolist():
            name = requests[place].kind
            if name is not None:
                by_kind[name].append(place)
        self._decided = {}
        now = time.time()
        for name, places in by_kind.items():
            kind = self._find(name, len(places), by_kind, now)
            if kind is None:
                threshold_rows[places] = FULL_DEPTH
                continue
            kind.use_weights(requests[places[0]].weights)
            if kind.wants_course:
                kind.begin_course()
            decidable = [place for place in places if threshold_rows[place] != FULL_DEPTH]
            coins = [self._toss() < kind.ledger.rate for _ in decidable]
            count = kind.ledger.decidable(coins) if kind.is_saved else 0
            threshold_rows[decidable[count:]] = FULL_DEPTH
            compared[decidable[:count]] = coins[:count]
            # What a policy in service does not decide, whatever a client sent, earns it no budget.
            earning = decidable if kind.state == "served" else places
            if earning:
                self._decided[name] = len(earning), count
            if kind.records:
                own = [
                    place
                    for place in places
                    if (threshold_rows[place] == FULL_DEPTH or compared[place])
                    and not requests[place].force_full_depth_prefill
                ]
                for place in own:
                    kind.see(requests[place].prompt)
                recorded += [(place, name) for place in own]
        if not recorded:
            return compared, None
        chosen, names = np.array([place for place, _ in recorded]), [name for _, name in recorded]
        subsets = np.array([requests[place].of_pool for place in chosen.tolist()])
        return compared, RecordedRequests(chosen, names, lens[chosen], subsets)

    def take_decided(self) -> Decided:
        """What `step_ended` is to get of the step that has run."""
        taken, self._decided = self._decided, {}
        return taken

    def step_ended(self, step: Decided, misses: Mapping[str, int]) -> None:
        """Enter a step into the ledgers; `misses` are the changed answers by policy."""
        for name, (requests, decided) in step.items():
            self._add(self.kinds[name], requests, decided, misses.get(name, 0))

    def save(self, is_last: bool = False) -> None:
        """Write the ledgers that have changed; `is_last`: no step will follow."""
        for name, kind in list(self.kinds.items()):
            kind.save(self._directory.ledger(name), reserves=not is_last)

    def _add(self, kind: AdmittedKind, requests: int, decided: int, misses: int) -> None:
        """Enter requests into a ledger, and tell people what follows."""
        name, ledger = kind.name, kind.ledger
        was_closed, rate, opens = ledger.is_closed, ledger.rate, decided and not ledger.decided
        kind.add(requests, decided, misses, self._directory.ledger(name))
        if opens:
            logger.info("kind %s is open: from now on its requests may exit", name)
            self._directory.tell(name, "opened", requests=ledger.requests)
        if ledger.is_closed and not was_closed:
            logger.warning(
                "kind %s is closed, its requests run at full depth until it has a new policy: %s",
                name,
                ledger.why_closed,
            )
            self._directory.tell(name, "closed", requests=ledger.requests, why=ledger.why_closed)
            kind.begin_course()
        elif ledger.rate != rate:
            logger.info(
                "kind %s: from now on %g of its requests run all layers to be compared, not %g",
                name,
                ledger.rate,
                rate,
            )

    def _find(
        self, name: str, requests: int, step: Container[str], now: float
    ) -> AdmittedKind | None:
        """The kind of requests that have just come; None if it has no place and gets none.

        `step` has all kinds of this step, which keep their places.
        """
        if (kind := self.kinds.get(name)) is not None:
            kind.recent.add(requests, now)
            return kind
        recent = self._counted.pop(name, None) or Recent()
        recent.add(requests, now)
        if round(recent.requests) >= RECURS and self._has_room(recent.requests, step, now):
            auto = self._auto
            ledger = Ledger(auto.epsilon, auto.delta, auto.full_depth_rate)
            self.kinds[name] = AdmittedKind(name, ledger, now, recent)
            logger.info("kind %s recurs: its requests are recorded from now on", name)
            self._directory.tell(name, "recording")
            return self.kinds[name]
        self._counted[name] = recent
        if len(self._counted) > MOST_COUNTED:
            self._counted.popitem(last=False)
        return None

    def _has_room(self, wants: float, step: Container[str], now: float) -> bool:
        """Whether one more kind may be recorded; see `who_goes` for who makes room for it."""
        holders = {name: kind for name, kind in self.kinds.items() if kind.keeps_rows}
        if len(self.kinds) >= MOST_KINDS:
            if len(holders) < MOST_RECORDED:
                holders = self.kinds
        elif len(holders) < MOST_RECORDED or self._one_has_grown(holders.values()):
            return True
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        may_go = {
            name: kind
            for name, kind in holders.items()
            if name not in step and (kind.state != "served" or self._retired < MOST_RETIRED)
        }
        name = who_goes(may_go, wants, now)
        if name is None:
            return False
        kind = self.kinds.pop(name)
        self._retired += kind.state == "served"
        self._lost.append(kind)
        self._lost_before += Counted.of_ledger(kind.content)
        logger.info("kind %s loses its place to one that comes more often", name)
        self._directory.tell(name, "lost its place")
        return True

    def _one_has_grown(self, holders: Iterable[AdmittedKind]) -> bool:
        """Whether one that has a policy gave up its rows; it is the one that came least of late."""
        served = [kind for kind in holders if kind.state == "served"]
        if not served:
            return False
        now = time.time()
        kind = min(served, key=lambda one: one.recent.at(now))
        kind.has_grown, kind.records = True, False
        kind.note()
        return True


def who_goes(holders: Mapping[str, AdmittedKind], wants: float, now: float) -> str | None:
    """The kind that loses its place to one with `wants` recent requests; None if none does.

    Of the kinds that are done, or else of all that have had a place for a while, it is the one with
    the fewest recent requests.
    """
    recent = {name: kind.recent.at(now) for name, kind in holders.items()}
    if done := [name for name, kind in holders.items() if kind.is_done]:
        return min(done, key=recent.__getitem__)
    old = [name for name, kind in holders.items() if now - kind.since >= YOUNG_SECONDS]
    least = min(old, key=recent.__getitem__, default=None)
    return least if least is not None and wants >= OFTENER * recent[least] else None
