"""A promise about order: how often a query loses one of its first documents."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.promise.promise import Outcome, Promise, Unit, labelled


class FirstDocuments(Promise):
    """At most epsilon of the queries lose a document, see `breaks`.

    How far a score may move depends on those of the query's other documents, which no row knows.
    Thresholds are those that lose few documents in calibration.
    """

    kind: Literal["first-documents"] = "first-documents"
    k: int = Field(ge=1, le=1024, description="How many documents of a query users look at.")
    margin: float = Field(
        gt=0,
        lt=1,
        description="A document of the first k counts as lost only if its score at full depth lies "
        "more than this above that of the document after them.",
    )
    bounded: ClassVar[str] = "of the queries wrong"
    broken: ClassVar[str] = "shadow queries lose one of their first documents"
    unit: ClassVar[Unit] = Unit.QUERY
    reads_values: ClassVar[bool] = True
    best_may_change: ClassVar[bool] = True
    answers_stand: ClassVar[bool] = True  # an order of scores of both kinds may lose a document
    right_about: ClassVar[str] = (
        "scores are right about which documents of a query come first, not in value"
    )
    section: ClassVar[str] = "queries"
    beyond: ClassVar[str] = "of the queries lose a document"
    bounds: ClassVar[str] = "how often queries lose a document"
    option: ClassVar[str] = "--top"

    @classmethod
    @override
    def asked(cls, value: str) -> FirstDocuments:
        must_be = "a number of documents and a margin between 0 and 1, such as 5:0.05"
        [found] = labelled(
            "--top", [value], lambda k, margin: cls(k=int(k), margin=margin), must_be
        )
        return found

    @override
    def admits(self) -> dict[str, object]:
        first = (self.k, self.margin)
        return super().admits() | {"the first documents that it promises": first}

    @override
    def wrong(self, early: Outcome, full: Outcome) -> Tensor:
        """Whether a score moves by more than half of the margin.

        Two documents that move by less do not pass each other if they lie the margin apart: what a
        fit may go by, which sees single rows.
        """
        return self.moves(early, full) > self.margin / 2

    @override
    def breaks(self, early: Floats, full: Floats) -> bool:
        """Whether a document of the first `k` at full depth is not among them early.

        Only those count that lie more than the margin above the document after them. Documents with
        the same score keep their order, as vLLM's ``/rerank`` does.
        """
        if len(full) <= self.k:
            return False
        must_stay = full > full[ranked(full)[self.k]] + self.margin
        must_stay[ranked(early)[: self.k]] = False
        return bool(must_stay.any())

    @override
    def check_groups(self, groups: Ints, data: str) -> None:
        most = int(np.bincount(groups).max())
        if most <= self.k:
            held = "prompts that stand alone" if most == 1 else f"at most {most} documents a query"
            raise AdaInferError(
                f"--top {self.k} is about queries with more than {self.k} documents, and {data} "
                f"has {held}: give each query with all the documents that it is sent with, or a "
                "smaller --top"
            )

    @override
    def moves(self, early: Outcome, full: Outcome) -> Tensor:
        assert early.labels is not None
        assert full.labels is not None
        return early.labels.largest_move(full.labels, False)

    @override
    def words(self) -> str:
        return (
            f"a query that loses one of its first {self.k} documents which at full depth "
            f"scores more than {self.margin:g} above the next"
        )


def relevance(outcome: Outcome) -> Tensor:
    """[rows], the probability of the last label, by which a reranker orders documents."""
    assert outcome.labels is not None
    return outcome.labels.among[:, -1]


def ranked(scores: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[documents], their places in order, the highest score first."""
    return np.argsort(-scores, kind="stable")
