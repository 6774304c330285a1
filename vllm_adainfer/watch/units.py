"""The units that a watch counts: an answer, a text, answers about one text, or a query.

Units are counted in the order in which they began. The order in which they end would be a biased
sample: small ones come first. A text ends with its request. Nothing says how many parts an HTTP
request has, such as questions about one text or the documents of a query: it is complete once so
many other requests have ended that no further part can be on its way.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from typing_extensions import override

from vllm_adainfer.arrays import Floats, Ints

ENDED_SINCE = 1000  # requests after the last part of a unit, before it counts
MOST_DOCUMENTS = 10_000  # of a query that counts
LONGEST = 256  # characters of a document's request id that are kept: its end, which vLLM draws
NO_LEVEL = -1  # of a document that runs at full depth in service, too


@dataclass(frozen=True)
class Grouping:
    """What counts once; without further fields, each answer.

    Attributes:
        most: the most answers of a unit that count.
        group_of: the HTTP request that the request of an id is part of, None for one that is a unit
            by itself; without it, each request is.
        loses: for queries, whose documents count once: whether the order of the scores that are
            served [documents] loses a document of that of the scores at full depth [documents].

    """

    most: int = 1
    group_of: Callable[[str], str | None] = lambda request_id: None
    loses: Callable[[Floats, Floats], bool] | None = None


EACH_ANSWER = Grouping()


@dataclass
class Unit:
    """A unit, as far as its answers have been compared.

    Attributes:
        level: the level of the epsilon table that it is decided at.
        checked: number of answers compared; 1 for a query, 0 for one that does not count.
        disagreed: number of those that differed.
        seen_at: how many requests had ended when the latest of them began or was compared.
        is_over: whether no further answer counts.
        group: the HTTP request that a query's documents are parts of; clients may use an id again.
        scores: of a query, the score that is served and that at full depth of each document, by the
            end of its request's id and in the order of the query; None until they are known.
        is_whole: False once a document is known to be missing: an order without it is another one.

    """

    level: int = NO_LEVEL
    checked: int = 0
    disagreed: int = 0
    seen_at: int = 0
    is_over: bool = False
    group: str | None = None
    scores: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    is_whole: bool = True


class Units:
    """The units of which more answers may come, and those that are still to be counted."""

    def __init__(self, grouping: Grouping) -> None:
        """Begin without any."""
        self._most, self._group_of = grouping.most, grouping.group_of
        self._ended = 0
        self._alone: dict[str, Unit] = {}  # by request
        self._of_parts: OrderedDict[str, Unit] = OrderedDict()  # the one seen last comes last
        self._to_count: deque[Unit] = deque()

    def expect(self, request_id: str, level: int) -> None:
        """An answer begins that is compared later, if it ever is: its unit counts in this place."""
        self._unit_of(request_id, level, ends_now=False)

    def add(self, request_id: str, level: int, differs: bool) -> None:
        """Count an answer in its unit."""
        unit = self._unit_of(request_id, level, ends_now=self._most == 1)
        if unit.is_over:  # a client may use one id for ever: this does not keep its unit going
            return
        unit.checked += 1
        unit.disagreed += differs
        unit.is_over = unit.checked == self._most

    def _unit_of(self, request_id: str, level: int, ends_now: bool) -> Unit:
        """The unit of an answer, which is new or goes on; one alone that `ends_now` is not kept."""
        name = self._group_of(request_id)
        units = self._alone if name is None else self._of_parts
        key = request_id if name is None else name
        unit = units.get(key)
        if unit is None:
            unit = Unit(level)
            self._to_count.append(unit)
            if name is not None or not ends_now:
                units[key] = unit
        if name is not None and not unit.is_over:
            self._seen(name)
        return unit

    def ended(self, request_id: str, ran: bool) -> None:
        """A request, of a unit or not, has ended; `ran`: whether it ever ran."""
        self._ended += 1
        if (unit := self._alone.pop(request_id, None)) is not None:
            unit.is_over = True
        while self._of_parts:
            name, unit = next(iter(self._of_parts.items()))
            if self._ended - unit.seen_at < ENDED_SINCE:
                break
            self._close(name)

    def take_complete(self) -> Iterator[Unit]:
        """The units that are over and count, up to the first that is not over."""
        while self._to_count and self._to_count[0].is_over:
            unit = self._to_count.popleft()
            if unit.checked:
                yield unit

    def _seen(self, name: str) -> None:
        self._of_parts[name].seen_at = self._ended
        self._of_parts.move_to_end(name)

    def _close(self, name: str) -> None:
        self._of_parts.pop(name).is_over = True


class Queries(Units):
    """Queries by their first document. Each counts once, if the scores of all documents are known.

    The documents of one query come as requests of their own, in one step or in several.
    """

    def __init__(self, grouping: Grouping) -> None:
        """Begin without any; `grouping.loses` judges them."""
        super().__init__(grouping)
        assert grouping.loses is not None
        self._loses = grouping.loses
        self._query_of: dict[str, str] = {}  # by document
        self._latest_query: dict[str | None, str] = {}  # by group

    def began(self, request_id: str, query: str) -> None:
        """A document of a shadow query begins to run, or does so again.

        `query` is the request of its first document, which names it. Of a query that began before
        this watch did, some scores are not known, so it never counts.
        """
        document, query = request_id[-LONGEST:], query[-LONGEST:]
        if document == query and query not in self._of_parts:
            unit = Unit(group=self._group_of(request_id))
            self._of_parts[query], self._latest_query[unit.group] = unit, query
            self._to_count.append(unit)
        found = self._of_parts.get(query)
        if found is None:
            return
        self._seen(query)
        if document not in found.scores and len(found.scores) == MOST_DOCUMENTS:
            found.is_whole = False
            return
        found.scores.setdefault(document, None)
        self._query_of[document] = query

    def compared(
        self, request_ids: Sequence[str], levels: Ints, early: Floats, full: Floats
    ) -> None:
        """Note the scores of documents in service and at full depth; all are [documents].

        `levels` are those that each was decided at, or `NO_LEVEL`.
        """
        documents = zip(request_ids, levels.tolist(), early.tolist(), full.tolist(), strict=True)
        for request_id, level, early_score, full_score in documents:
            document = request_id[-LONGEST:]
            name = self._query_of.get(document)
            if name is not None:
                self._seen(name)
                query = self._of_parts[name]
                query.scores[document] = early_score, full_score
                query.level = max(query.level, level)

    @override
    def ended(self, request_id: str, ran: bool) -> None:
        name = None if ran else self._latest_query.get(self._group_of(request_id))
        if name is not None:
            self._of_parts[name].is_whole = False  # as when a client hangs up
        super().ended(request_id, ran)

    @override
    def _close(self, name: str) -> None:
        query = self._of_parts[name]
        super()._close(name)
        for document in query.scores:
            del self._query_of[document]
        if self._latest_query.get(query.group) == name:
            del self._latest_query[query.group]
        known = [scores for scores in query.scores.values() if scores is not None]
        if query.level != NO_LEVEL and query.is_whole and len(known) == len(query.scores):
            query.checked = 1
            query.disagreed = int(self._loses(*np.array(known).T))
