"""The loss of a query: whether its early order loses one of the first documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.fields import TopK
from vllm_adainfer.offline.calibration.certify.path import PathPoint
from vllm_adainfer.promise.first_documents import loses_document, ranked


@dataclass(frozen=True)
class Queries:
    """The queries that some rows are the documents of.

    Attributes:
        top_k: what is promised of each.
        rows: the rows of each query, int64 [its documents].
        full: [rows], the scores at full depth.

    """

    top_k: TopK
    rows: tuple[Ints, ...]
    full: Floats

    @classmethod
    def of_groups(cls, top_k: TopK, groups: Ints, full: Floats) -> Queries:
        """The queries of `groups`, [rows], in ascending order."""
        rows = tuple(np.flatnonzero(groups == one) for one in np.unique(groups))
        return cls(top_k, rows, full)

    def losses(self, point: PathPoint) -> Floats:
        """[queries], 1 where the order of the scores at `point` loses a document, else 0."""
        early = self._scores(point)
        lost = [loses_document(early[own], self.full[own], self.top_k) for own in self.rows]
        return np.array(lost, dtype=np.float64)

    def worst_losses(self, one: PathPoint, other: PathPoint) -> Floats:
        """The same if each document may have its score at `one` or at `other`, at worst.

        A document is lost at worst where it has the lower one, and all others have the higher one.
        """
        scores = self._scores(one), self._scores(other)
        low, high = np.minimum(*scores), np.maximum(*scores)
        lost = [
            any(
                loses_document(
                    np.where(np.arange(len(own)) == place, low[own], high[own]),
                    self.full[own],
                    self.top_k,
                )
                for place in ranked(self.full[own])[: self.top_k.k]
            )
            for own in self.rows
        ]
        return np.array(lost, dtype=np.float64)

    def _scores(self, point: PathPoint) -> Floats:
        """[rows], early scores at `point`, and full depth's where it has none."""
        scores: Floats = np.where(np.isnan(point.relevance), self.full, point.relevance)
        return scores

    def on(self, path: Iterable[PathPoint]) -> Iterator[PathPoint]:
        """The same points, with the losses of queries in place of those of rows."""
        for point in path:
            yield replace(point, losses=self.losses(point))


def rows_allowed(path: Iterable[PathPoint], queries: Queries, allowed: float) -> float:
    """The mean loss of rows at the loosest point where that of queries is within `allowed`.

    The choice of exit points goes by the loss of rows, which adds up over them.
    """
    found = 0.0
    for point in path:
        if queries.losses(point).mean() > allowed:
            break
        found = point.risk
    return found
