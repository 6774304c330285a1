"""Certify the two parts of a pooled policy together, whichever of them decides a request.

Heads that read whole prompts decide a request, or heads for the last token, where tokens of its own
were in the prefix cache. Which of them does is no matter of chance: it depends on the prompt and on
the traffic. If each part kept epsilon by itself, a mixture of both could exceed it, twice over at
worst, and each would spend delta.

So one path of pairs of thresholds is walked, and the loss of a row is the larger one of both parts.

**One epsilon.** For a request x and whatever decides which part answers it, the loss served is at
most max(whole(x), last(x)). Hence its mean over requests like those that certify is at most
E[max(whole, last)], which is certified, and so is that of either part alone. A promise about one
label counts, of the answers that the parts give a row, the one that is worse for it (see
`Pair.answers_about`), and an order the worst scores that the documents of a query can have.
Accuracy lost is signed: an answer that is right where full depth is wrong counts as a gain only if
both parts give it.

**One delta.** The rows that fit choose the pairs, so the path is fixed before a held-out row is
seen, and the proof of `loosest_certified` holds for it as it does for one threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.offline.calibration.certify.path import (
    PathPoint,
    threshold_grid,
    threshold_path,
)
from vllm_adainfer.offline.calibration.certify.queries import Queries
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored

# The share of the losses that heads for the last token may add to those of whole prompts. Few
# requests come to them, and a share of the losses buys either part about as many layers: the share
# that saves most is the share of requests.
LAST_TOKEN_SHARE = 0.1

Thresholds = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Pair:
    """The policies of both parts at a pair of thresholds, on some rows.

    Attributes:
        whole: the part for whole prompts.
        last: the part for the last token.
        losses: [rows], the largest loss of each row, whichever part decides it. Or [queries].

    """

    whole: PathPoint
    last: PathPoint
    losses: Floats

    @classmethod
    def of(cls, whole: PathPoint, last: PathPoint, queries: Queries | None = None) -> Pair:
        """Both parts on the same rows, which are the documents of `queries` if there are any."""
        if queries is not None:
            return cls(whole, last, queries.worst_losses(whole, last))
        return cls(whole, last, np.maximum(whole.losses, last.losses))

    @property
    def full(self) -> Ints:
        """int64 [rows], the full model's answers."""
        return self.whole.full

    def answers_about(self, token: int) -> Ints:
        """int64 [rows], the answer of either part that is worse for promises about `token`.

        Where full depth answers with `token` that is another one, and elsewhere `token`. So recall
        counts a row that either part misses. Precision counts a row that either part calls `token`
        wrongly, and one that it calls so rightly only if both do. At a precision of 1 - epsilon, a
        row is worth epsilon if it is right, 0 if it is not called so, and epsilon - 1 if it is
        wrong: the sum of these least worths bounds that of any mixture.
        """
        whole, last = self.whole.answers, self.last.answers
        worse = np.where(self.full == token, last != token, last == token)
        answers: Ints = np.where(worse, last, whole)
        return answers


def pair_path(
    whole: Sequence[FittedExit],
    last: Sequence[FittedExit],
    depth: int,
    thresholds: Thresholds,
    rows: Bools | None = None,
    queries: Queries | None = None,
) -> Iterator[Pair]:
    """The held-out rows, or `rows` of them, bool, at each pair of thresholds; see `certify`."""

    def path(exits: Sequence[FittedExit], own: Iterable[float]) -> Iterator[PathPoint]:
        scored = [one.held_out if rows is None else one.held_out.of_rows(rows) for one in exits]
        return threshold_path([one.layer for one in exits], scored, depth, [*own])

    points = zip(
        path(whole, (one for one, _ in thresholds)),
        path(last, (one for _, one in thresholds)),
        strict=True,
    )
    return (Pair.of(*both, queries) for both in points)


def pairs_of_thresholds(
    whole: Sequence[FittedExit],
    last: Sequence[FittedExit],
    depth: int,
    queries: Queries | None = None,
) -> Thresholds:
    """The pairs of thresholds (whole prompts, last token) to try, strictest first.

    For each threshold on whole prompts the loosest one on the last token that is no looser and adds
    no more than `LAST_TOKEN_SHARE` of the losses, on the rows that fit; neither ever rises.
    `queries` are those of the rows that fit.
    """

    def path(exits: Sequence[FittedExit]) -> list[PathPoint]:
        fitted: list[Scored] = [one.fitted for one in exits]
        layers = [one.layer for one in exits]
        return [*threshold_path(layers, fitted, depth, threshold_grid(exits))]

    def losses(one: PathPoint, other: PathPoint) -> float:
        return float(Pair.of(one, other, queries).losses.mean())

    looser, place, pairs = path(last), 0, []
    for point in path(whole):
        most = losses(point, looser[0]) / (1 - LAST_TOKEN_SHARE)
        for following in looser[place + 1 :]:
            if following.threshold < point.threshold or losses(point, following) > most:
                break
            place += 1
        pairs.append((point.threshold, looser[place].threshold))
    return pairs
