"""Monitor of a reranker's queries: how often their order loses a document of the first.

The documents of one query come as requests of their own, in one step or in several, and nothing
says how many there are. A query counts once so many other requests have ended that no further
document of it can be on its way.
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
MOST_DOCUMENTS = 10_000  # of a query: clients choose its id, and may use one for ever


@dataclass
class Query:
    """A shadow query, as far as its documents have been compared.

    Attributes:
        level: the level of the epsilon table that its documents are decided at.
        seen_at: how many requests had ended when its latest document was compared.
        early: the early scores.
        full: the scores at full depth.

    """

    level: int
    seen_at: int = 0
    early: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)


class QueryMonitor(AnswerMonitor):
    """Watches queries, each of which counts once."""

    def __init__(
        self,
        epsilons: Sequence[float],
        alpha: float,
        top_k: TopK,
        query_of: Callable[[str], str],
    ) -> None:
        """`query_of` gives the query of a request's id; see `Monitor` for the rest."""
        super().__init__(epsilons, alpha, "probability")
        self._top_k = top_k
        self._query_of = query_of
        self._ended = 0
        self._queries: OrderedDict[str, Query] = OrderedDict()  # the one seen last comes last
        self._counted: list[tuple[float, bool]] = []

    def compared(
        self, request_ids: Sequence[str], levels: Ints, early: Floats, full: Floats
    ) -> None:
        """Note the scores of documents.

        Args:
            request_ids: [documents], the request of each.
            levels: [documents], the level each was decided at.
            early: [documents], their early scores.
            full: [documents], their scores at full depth.

        """
        documents = zip(request_ids, levels.tolist(), early.tolist(), full.tolist(), strict=True)
        for request_id, level, early_score, full_score in documents:
            name = self._query_of(request_id)
            query = self._queries.setdefault(name, Query(level))
            self._queries.move_to_end(name)
            query.seen_at = self._ended
            if len(query.full) < MOST_DOCUMENTS:
                query.early.append(early_score)
                query.full.append(full_score)

    @override
    def ended(self, request_id: str) -> list[MonitorStatus]:
        self._ended += 1
        found = []
        while self._queries:
            name, query = next(iter(self._queries.items()))
            if self._ended - query.seen_at < ENDED_SINCE:
                break
            del self._queries[name]
            found += self._judge(query)
        return found

    def _judge(self, query: Query) -> list[MonitorStatus]:
        lost = loses_document(np.array(query.early), np.array(query.full), self._top_k)
        self._counted.append((float(self.epsilons[query.level]), lost))
        return self._count(query.level, 1, int(lost))

    def take_counted(self) -> list[tuple[float, bool]]:
        """The epsilon of each query counted since the last call, and whether it lost a document."""
        counted, self._counted = self._counted, []
        return counted
