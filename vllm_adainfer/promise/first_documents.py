"""A promise about order: how often a query loses one of its first documents."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.arrays import Floats
from vllm_adainfer.artifact.fields import TopK
from vllm_adainfer.promise.promise import Outcome, Promise, Unit


class FirstDocuments(Promise):
    """At most epsilon of the queries lose a document, see `loses_document`.

    How far a score may move depends on those of the query's other documents, which no row knows.
    Thresholds are those that lose few documents in calibration.

    Attributes:
        top_k: which documents of a query an early order must keep.

    """

    risk = "probability"
    bounded = "of the queries wrong"
    broken = "shadow queries lose one of their first documents"
    unit = Unit.QUERY
    reads_values = True
    best_may_change = True
    right_about = "scores are right about which documents of a query come first, not in value"

    def __init__(self, top_k: TopK) -> None:
        """See the class."""
        self.top_k = top_k

    @override
    def admits(self) -> dict[str, object]:
        return super().admits() | {"the first documents that it promises": self.top_k}

    @override
    def wrong(self, early: Outcome, full: Outcome) -> Tensor:
        """Whether a score moves by more than half of the margin.

        Two documents that move by less do not pass each other if they lie the margin apart: what a
        fit may go by, which sees single rows.
        """
        return self.moves(early, full) > self.top_k.margin / 2

    @override
    def breaks(self, early: Floats, full: Floats) -> bool:
        return loses_document(early, full, self.top_k)

    @override
    def moves(self, early: Outcome, full: Outcome) -> Tensor:
        assert early.labels is not None
        assert full.labels is not None
        return early.labels.largest_move(full.labels, False)

    @override
    def words(self) -> str:
        return (
            f"a query that loses one of its first {self.top_k.k} documents which at full depth "
            f"scores more than {self.top_k.margin:g} above the next"
        )


def relevance(outcome: Outcome) -> Tensor:
    """[rows], the probability of the last label, by which a reranker orders documents."""
    assert outcome.labels is not None
    return outcome.labels.among[:, -1]


def loses_document(early: Floats, full: Floats, top_k: TopK) -> bool:
    """Whether a document of the first `top_k.k` at full depth is not among them early.

    Only those count that lie more than the margin above the document after them. Documents with
    the same score keep their order, as vLLM's ``/rerank`` does.

    Args:
        early: [documents], their early scores; full depth's where none was given.
        full: [documents], their scores at full depth.
        top_k: what is promised.

    """
    if len(full) <= top_k.k:
        return False
    must_stay = full > full[ranked(full)[top_k.k]] + top_k.margin
    must_stay[ranked(early)[: top_k.k]] = False
    return bool(must_stay.any())


def ranked(scores: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[documents], their places in order, the highest score first."""
    return np.argsort(-scores, kind="stable")
