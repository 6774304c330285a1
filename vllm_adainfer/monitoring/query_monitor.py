"""Monitor of a reranker's queries: how often their order loses a document of the first.

The documents of one query come as requests of their own, in one step or in several, and nothing
says how many there are. A query counts once so many other requests have ended that no further
document of it can be on its way. It counts only if the scores of all its documents are known: an
order without some of them is another one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from typing_extensions import override

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.fields import TopK
from vllm_adainfer.artifact.top_k import loses_document
from vllm_adainfer.monitoring.monitor import AnswerMonitor, MonitorStatus

ENDED_SINCE = 1000  # requests after the last document of a query, before the query counts
MOST_DOCUMENTS = 10_000  # of a query that counts
LONGEST = 256  # characters of a request's id that are kept: its end, which vLLM draws
NO_LEVEL = -1  # of a document that runs at full depth in service, too


@dataclass
class Query:
    """A shadow query, as far as its documents have been compared.

    Attributes:
        group: the HTTP request that its documents are parts of; clients may use an id again.
        level: the level of the epsilon table that its documents are decided at; None until one is.
        seen_at: how many requests had ended when its latest document began or was compared.
        scores: the score that is served and that at full depth of each document, by the end of its
            request's id and in the order of the query; None until they are known.
        is_whole: False once a document is known to be missing.

    """

    group: str | None
    level: int | None = None
    seen_at: int = 0
    scores: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    is_whole: bool = True


class QueryMonitor(AnswerMonitor):
    """Watches queries, each of which counts once."""

    def __init__(
        self,
        epsilons: Sequence[float],
        alpha: float,
        top_k: TopK,
        group_of: Callable[[str], str | None],
    ) -> None:
        """See `Monitor`; `group_of` gives the HTTP request that an engine request is part of."""
        super().__init__(epsilons, alpha, "probability")
        self._top_k = top_k
        self._group_of = group_of
        self._ended = 0
        self._queries: OrderedDict[str, Query] = OrderedDict()  # the one seen last comes last
        self._query_of: dict[str, str] = {}  # by document
        self._latest_query: dict[str | None, str] = {}  # by group
        self._counted: list[tuple[float, bool]] = []

    def began(self, request_id: str, query: str) -> None:
        """A document of a shadow query begins to run, or does so again.

        Args:
            request_id: its request.
            query: the request of the query's first document, which names the query. Of a query that
                began before this monitor did, some scores are not known, so it never counts.

        """
        document, query = request_id[-LONGEST:], query[-LONGEST:]
        if document == query and query not in self._queries:
            group = self._group_of(request_id)
            self._queries[query], self._latest_query[group] = Query(group), query
        found = self._queries.get(query)
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
        """Note the scores of documents.

        Args:
            request_ids: [documents], the request of each.
            levels: [documents], the level each was decided at, or `NO_LEVEL`.
            early: [documents], the scores that they have in service.
            full: [documents], their scores at full depth.

        """
        documents = zip(request_ids, levels.tolist(), early.tolist(), full.tolist(), strict=True)
        for request_id, level, early_score, full_score in documents:
            document = request_id[-LONGEST:]
            name = self._query_of.get(document)
            if name is None:
                continue
            query = self._seen(name)
            query.scores[document] = early_score, full_score
            if level != NO_LEVEL:
                query.level = level

    def never_ran(self, request_id: str) -> None:
        """A request, of a query or not, has ended before it ran, as when its client hung up."""
        name = self._latest_query.get(self._group_of(request_id))
        if name is not None:
            self._queries[name].is_whole = False

    @override
    def ended(self, request_id: str) -> list[MonitorStatus]:
        self._ended += 1
        found = []
        while self._queries:
            name, query = next(iter(self._queries.items()))
            if self._ended - query.seen_at < ENDED_SINCE:
                break
            self._forget(name)
            found += self._judge(query)
        return found

    def _seen(self, name: str) -> Query:
        query = self._queries[name]
        query.seen_at = self._ended
        self._queries.move_to_end(name)
        return query

    def _forget(self, name: str) -> None:
        query = self._queries.pop(name)
        for document in query.scores:
            del self._query_of[document]
        if self._latest_query.get(query.group) == name:
            del self._latest_query[query.group]

    def _judge(self, query: Query) -> list[MonitorStatus]:
        known = [scores for scores in query.scores.values() if scores is not None]
        if query.level is None or not query.is_whole or len(known) < len(query.scores):
            return []
        early, full = np.array(known).T
        lost = loses_document(early, full, self._top_k)
        self._counted.append((float(self.epsilons[query.level]), lost))
        return self._count(query.level, 1, int(lost))

    def take_counted(self) -> list[tuple[float, bool]]:
        """The epsilon of each query counted since the last call, and whether it lost a document."""
        counted, self._counted = self._counted, []
        return counted
