"""Questions with passages to rerank: BoolQ and SQuAD, and what TF-IDF finds for each question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from vllm_adainfer.arrays import Floats

WORDS = 64  # of a passage; the rest is cut off, for time
CHAT_TEMPLATE = (
    "Query: {{ (messages | selectattr('role', 'eq', 'query') | first).content }}\n"
    "Passage: {{ (messages | selectattr('role', 'eq', 'document') | first).content }}\nRelevant:"
)


@dataclass(frozen=True)
class Query:
    """A question, and the passages that TF-IDF scores highest, best first.

    `right` is the place in `documents` of the passage that the question was written for, if found.
    """

    text: str
    documents: tuple[str, ...]
    scores: Floats
    right: int | None


def find_candidates(data: Path, part: str, most: int) -> list[Query]:
    """The questions of one part of the data, in random order, each with `most` candidates.

    Passages come from all questions of the part. BoolQ's title before " -- " is left out, as it
    would give the passage away.
    """
    rows = [
        json.loads(line)
        for task in ("boolq", "squad")
        for line in Path(data, task, f"{part}.jsonl").read_text().splitlines()
    ]
    questions = [row["question"] for row in rows]
    own = [_passage(row["context"]) for row in rows]
    passages = list(dict.fromkeys(own))
    vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(passages)
    scores = (vectors.transform(questions) @ vectors.transform(passages).T).toarray()
    found = [
        _query(question, passage, passages, row, most)
        for question, passage, row in zip(questions, own, scores, strict=True)
    ]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


def _passage(context: str) -> str:
    return " ".join(context.rpartition(" -- ")[2].split()[:WORDS])


def _query(question: str, own: str, passages: Sequence[str], scores: Floats, most: int) -> Query:
    best = np.argsort(-scores, kind="stable")[:most]
    documents = tuple(passages[place] for place in best)
    right = documents.index(own) if own in documents else None
    return Query(question, documents, scores[best], right)
