"""The path of policies that one joint threshold goes along, or a pair of thresholds for two parts.

One threshold on the settled score serves all exit points, so as it falls, no row leaves later than
before: a path with one parameter.

**Two parts.** Heads that read whole prompts decide a request, or heads for the last token, where
tokens of its own were in the prefix cache. Which of them does is no matter of chance: it depends on
the prompt and on the traffic. If each part kept epsilon by itself, a mixture of both could exceed
it, twice over at worst, and each would spend delta. So one path of pairs of thresholds is walked,
and the loss of a row is the larger one of both parts.

*One epsilon.* For a request x and whatever decides which part answers it, the loss served is at
most max(whole(x), last(x)). Hence its mean over requests like those that certify is at most
E[max(whole, last)], which is certified, and so is that of either part alone. A promise about one
label counts, of the answers that the parts give a row, the one that is worse for it (see
`Pair.answers_about`), and an order the worst scores that the documents of a query can have.
Accuracy lost is signed: an answer that is right where full depth is wrong counts as a gain only if
both parts give it.

**Any exit point.** Where a step asks at one exit point only (`exits/loop/schedule.py`), a row that
an earlier one would have settled may be answered by a later one, whose answer may be another. So
the loss of a row is the largest one of all exit points that settle it, which bounds that of every
way to choose where to ask, as for two parts.

*One delta.* The rows that fit choose the pairs, so the path is fixed before a held-out row is
seen, and the proof of `certify` holds for it as it does for one threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored
from vllm_adainfer.promise.first_documents import FirstDocuments, ranked

STEPS = 200
# The share of the losses that heads for the last token may add to those of whole prompts. Few
# requests come to them, and a share of the losses buys either part about as many layers: the share
# that saves most is the share of requests.
LAST_TOKEN_SHARE = 0.1


Read: TypeAlias = Callable[[Ints], Ints]  # what a promise reads of answers, see `LabelTest`


def same(answers: Ints) -> Ints:
    """Answers as they are."""
    return answers


@dataclass(frozen=True)
class PathPoint:
    """The policy at one joint threshold, on some prompts.

    Attributes:
        threshold: the threshold on the settled score.
        exits: [rows], index of the exit point where each row exits; the number of exit points
            for a row that runs to the end.
        losses: [rows], the loss of each row where it exits; 0 if it runs to the end. Of policies
            that may be asked at any exit point, the largest one. Or [queries].
        answers: int64 [rows], the answer of each row.
        full: int64 [rows], the full model's.
        layers_saved: share of layers, 0 to 1.
        relevance: [rows], see `Scored.relevance`; NaN for a row that runs to the end.

    """

    threshold: float
    exits: Ints
    losses: Floats
    answers: Ints
    full: Ints
    layers_saved: float
    relevance: Floats

    @property
    def disagreement(self) -> float:
        """Share of rows whose answer differs from the full model's."""
        return float(np.mean(self.answers != self.full))

    @property
    def risk(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    def answers_about(self, token: int, read: Read = same) -> Ints:
        """The answers that a promise about `token` is about, of which it reads `read`."""
        return self.answers


Points = dict[float, PathPoint]  # by epsilon


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

    @property
    def full(self) -> Ints:
        """int64 [rows], the full model's answers."""
        return self.whole.full

    def answers_about(self, token: int, read: Read = same) -> Ints:
        """int64 [rows], the answer of either part that is worse for promises about `token`.

        Where full depth answers with `token` that is another one, and elsewhere `token`. So recall
        counts a row that either part misses. Precision counts a row that either part calls `token`
        wrongly, and one that it calls so rightly only if both do. At a precision of 1 - epsilon, a
        row is worth epsilon if it is right, 0 if it is not called so, and epsilon - 1 if it is
        wrong: the sum of these least worths bounds that of any mixture.
        """
        whole, last = self.whole.answers, self.last.answers
        named = read(last) == token
        worse = np.where(read(self.full) == token, ~named, named)
        answers: Ints = np.where(worse, last, whole)
        return answers


@dataclass(frozen=True)
class Queries:
    """The queries that some rows are the documents of.

    Attributes:
        promise: what is promised of each.
        rows: the rows of each query, int64 [its documents].
        full: [rows], the scores at full depth.

    """

    promise: FirstDocuments
    rows: tuple[Ints, ...]
    full: Floats

    @classmethod
    def of_groups(cls, promise: FirstDocuments, groups: Ints, full: Floats) -> Queries:
        """The queries of `groups`, [rows], in ascending order."""
        rows = tuple(np.flatnonzero(groups == one) for one in np.unique(groups))
        return cls(promise, rows, full)

    def losses(self, *points: PathPoint) -> Floats:
        """[queries], 1 where an order loses a document if each may have its score at any point.

        A document is lost at worst where it has the lowest one, and all others have the highest. A
        row without an early score has full depth's.
        """
        scores = [np.where(np.isnan(p.relevance), self.full, p.relevance) for p in points]
        low, high = np.minimum.reduce(scores), np.maximum.reduce(scores)
        tried = self.promise.k if len(points) > 1 else 1  # one point has one order
        lost = [
            any(
                self.promise.breaks(
                    np.where(np.arange(len(own)) == place, low[own], high[own]), self.full[own]
                )
                for place in ranked(self.full[own])[:tried]
            )
            for own in self.rows
        ]
        return np.array(lost, dtype=np.float64)


def threshold_path(
    layers: Sequence[int],
    scored: Sequence[Scored],
    depth: int,
    thresholds: Sequence[float],
    any_exit_point: bool = False,
) -> Iterator[PathPoint]:
    """The policy with exit points after `layers` (ascending) at each threshold, strictest first.

    `any_exit_point`: losses are those of whichever exit point is asked.
    """
    rows, full = len(scored[0].loss), scored[0].full
    for threshold in thresholds:
        exits = np.full(rows, len(layers))
        losses, answers, relevance = np.zeros(rows), full.copy(), np.full(rows, np.nan)
        for index, exit_point in enumerate(scored):
            settled = (exit_point.score >= threshold).numpy()
            leaves = (exits == len(layers)) & settled
            exits[leaves] = index
            losses[leaves] = exit_point.loss[leaves]
            if any_exit_point:
                losses[settled] = np.maximum(losses, exit_point.loss)[settled]
            answers[leaves] = exit_point.tokens[leaves]
            if exit_point.relevance is not None:
                relevance[leaves] = exit_point.relevance[leaves]
        run = np.array([*layers, depth])[exits]
        saved = 1 - float(run.sum()) / (rows * depth)
        yield PathPoint(threshold, exits, losses, answers, full, saved, relevance)


def threshold_grid(exits: Sequence[FittedExit]) -> list[float]:
    """The thresholds to try, strictest first; taken from the fitted part only.

    Rows that are never settled have a score of -inf, and some a NaN; between those and others there
    is no quantile.
    """
    scores = torch.cat([exit.fitted.score for exit in exits]).double()
    scores = scores[scores.isfinite()]
    if not len(scores):
        return [float("inf")]
    grid = torch.quantile(scores, torch.linspace(1, 0, STEPS, dtype=torch.float64))
    return [float("inf"), *sorted(set(grid.tolist()), reverse=True)]


def fitted_path(exits: Sequence[FittedExit], depth: int) -> Iterator[PathPoint]:
    """`threshold_path` on the rows that fit."""
    scored = [one.fitted for one in exits]
    return threshold_path([one.layer for one in exits], scored, depth, threshold_grid(exits))


def held_out_path(
    exits: Sequence[FittedExit],
    depth: int,
    thresholds: Sequence[float],
    rows: Bools | None = None,
    queries: Queries | None = None,
    any_exit_point: bool = False,
) -> Iterator[PathPoint]:
    """`threshold_path` on the held-out rows, or on `rows` of them, bool.

    With `queries`, those of the held-out rows, losses are of queries.
    """
    scored = [one.held_out if rows is None else one.held_out.of_rows(rows) for one in exits]
    layers = [one.layer for one in exits]
    for point in threshold_path(layers, scored, depth, thresholds, any_exit_point):
        yield point if queries is None else replace(point, losses=queries.losses(point))


def pair_path(
    whole: Iterable[PathPoint], last: Iterable[PathPoint], queries: Queries | None = None
) -> Iterator[Pair]:
    """Both parts at each pair of thresholds, on the same rows: perhaps documents of `queries`."""
    for both in zip(whole, last, strict=True):
        yield Pair(*both, _largest_losses(queries, *both))


def _largest_losses(queries: Queries | None, *points: PathPoint) -> Floats:
    """[rows] or [queries], the largest loss of each, whichever of `points` decides it."""
    if queries is not None:
        return queries.losses(*points)
    losses: Floats = np.maximum.reduce([point.losses for point in points])
    return losses


def pairs_of_thresholds(
    whole: Sequence[FittedExit],
    last: Sequence[FittedExit],
    depth: int,
    queries: Queries | None = None,
) -> list[tuple[float, float]]:
    """The pairs of thresholds (whole prompts, last token) to try, strictest first.

    For each threshold on whole prompts the loosest one on the last token that is no looser and adds
    no more than `LAST_TOKEN_SHARE` of the losses, on the rows that fit; neither ever rises.
    `queries` are those of the rows that fit.
    """
    looser, place, pairs = [*fitted_path(last, depth)], 0, []
    for point in fitted_path(whole, depth):
        most = float(_largest_losses(queries, point, looser[0]).mean()) / (1 - LAST_TOKEN_SHARE)
        for following in looser[place + 1 :]:
            losses = float(_largest_losses(queries, point, following).mean())
            if following.threshold < point.threshold or losses > most:
                break
            place += 1
        pairs.append((point.threshold, looser[place].threshold))
    return pairs


def combine_questions(
    rows: Mapping[str, Bools],
    questions: Mapping[str, Points],
    exits: Sequence[FittedExit],
    depth: int,
) -> Points:
    """The points of all held-out rows: questions within their own bounds, others at full depth."""
    points: Points = {}
    for epsilon in sorted({epsilon for own in questions.values() for epsilon in own}):
        [full_depth] = held_out_path(exits, depth, [np.inf])
        leaving, losses, answers = full_depth.exits, full_depth.losses, full_depth.answers
        saved = 0.0
        for name, own in questions.items():
            if epsilon in own:
                point, share = own[epsilon], float(rows[name].mean())
                leaving[rows[name]], losses[rows[name]] = point.exits, point.losses
                answers[rows[name]] = point.answers
                saved += share * point.layers_saved
        points[epsilon] = replace(full_depth, threshold=np.nan, layers_saved=saved)
    return points
