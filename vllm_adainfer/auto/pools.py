"""Finds label pools: kinds whose labels vary, but are always some of the same few tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_adainfer.auto.table import RECURS, KindCount

MOST_LABELS = 64  # of a pool
FEWEST_SETS = 8  # of labels, before they are more than several questions


@dataclass
class Pool:
    """A pool candidate: one policy with a label pool could serve all of its kinds.

    Attributes:
        adapter: name of the kinds' LoRA adapter; None for the base model.
        labels: all labels of its kinds.
        sets: how many kinds it has, each with other labels.
        requests: how many requests came of all of them.
        tokens: token rows that ran for these.

    """

    adapter: str | None
    labels: set[int]
    sets: int = 0
    requests: int = 0
    tokens: int = 0

    def add(self, count: KindCount) -> None:
        """Take a kind in."""
        assert count.kind is not None
        self.labels.update(count.kind.labels)
        self.sets += 1
        self.requests += count.requests
        self.tokens += count.tokens

    def as_dict(self) -> dict[str, Any]:
        """What it is, for a file."""
        return {**vars(self), "labels": sorted(self.labels)}


def pools(counts: Iterable[KindCount]) -> list[Pool]:
    """The pool candidates among the kinds of single labels, the one with most requests first.

    Kinds with many labels come first, so that smaller sets find the pool that they are part of. A
    kind joins the pool that has most of its labels, if that stays small; the time is linear.
    """
    labels = [count for count in counts if count.kind is not None and count.kind.reads == "label"]
    found: list[Pool] = []
    owners: dict[tuple[str | None, int], int] = {}  # places in `found`
    for count in sorted(labels, key=lambda one: (-_size(one), -one.requests)):
        kind = count.kind
        assert kind is not None
        if not 2 <= len(kind.labels) <= MOST_LABELS:
            continue
        keys = [(kind.adapter, label) for label in kind.labels]
        having = Counter(owners[key] for key in keys if key in owners)
        number = having.most_common(1)[0][0] if having else len(found)
        if not having or len(found[number].labels.union(kind.labels)) > MOST_LABELS:
            number = len(found)
            found.append(Pool(kind.adapter, set()))
        found[number].add(count)
        for key in keys:
            owners.setdefault(key, number)
    kept = [one for one in found if one.sets >= FEWEST_SETS and one.requests >= RECURS]
    return sorted(kept, key=lambda one: -one.requests)


def _size(count: KindCount) -> int:
    assert count.kind is not None
    return len(count.kind.labels)
