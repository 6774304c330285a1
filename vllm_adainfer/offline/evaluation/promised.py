"""The report's rows about what a policy promises: how often answers break it.

Answers are compared with never exiting in the same round. Shares are medians over the rounds, as
the report's disagreement is; what else a row says is that of the first round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import ndcg_score

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.score_labels import YES
from vllm_adainfer.offline.evaluation.probabilities import (
    among_labels,
    label_mass,
    quality,
    true_labels,
)
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Rounds, Run
from vllm_adainfer.offline.reports.shares import Share, of_rounds
from vllm_adainfer.promise.first_documents import FirstDocuments, ranked
from vllm_adainfer.promise.kinds import PROMISES
from vllm_adainfer.promise.probabilities import LabelProbabilities
from vllm_adainfer.promise.promise import Outcome, Promise, Unit

NDCG_AT = 10
MOVES: dict[str, Callable[[Any], Any]] = {
    "move_mean": np.mean,
    "move_p95": partial(np.quantile, q=0.95),
    "move_max": np.max,
}


def promised_rows(
    config: ArtifactConfig, examples: Sequence[Example], groups: Ints, rounds: Rounds
) -> dict[str, Any]:
    """What a report has of the policy's promise, beside the rate at which answers change.

    `groups` [prompts] are independent; runs have log-probabilities if these are promised.

    ``risk``, and under the promise's `section` a row for `stock`, whose differences are rounding,
    one for `never_exit`, and `levels`, with a row for each epsilon and the share that is ``wrong``;
    empty for a promise about answers alone.
    """
    promise = config.promise
    if not promise.section:
        return {}
    compared = _Compared(config, examples, groups, rounds)
    data = promise.model_dump(include={"tolerance", "label_mass", "k", "margin"})
    if promise.unit is Unit.QUERY:
        return {"risk": "probability", promise.section: {**data, **compared.by_query()}}
    return {"risk": "probability", **data, promise.section: compared.by_answer()}


def bounded_rows(promised: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of the levels among `promised_rows`, or in a report; None if there are none."""
    found = [promised[one.section]["levels"] for one in PROMISES if one.section in promised]
    return found[0] if found else None


def default_level(report: Mapping[str, Any]) -> dict[str, Any]:
    """The row of what is bounded at the artifact's own epsilon, in a report that has such rows."""
    rows = bounded_rows(report)
    assert rows is not None
    return next(row for row in rows if row["epsilon"] == report["epsilon"])


@dataclass(frozen=True)
class _Compared:
    """Runs beside those that never exit; see `promised_rows` for the attributes."""

    config: ArtifactConfig
    examples: Sequence[Example]
    groups: Ints
    rounds: Rounds

    @property
    def promise(self) -> Promise:
        return self.config.promise

    @property
    def full(self) -> list[Run]:
        return [by_epsilon[NEVER_EXIT] for _, by_epsilon in self.rounds]

    def rows(self, row: Callable[[Sequence[Run]], dict[str, Any]]) -> dict[str, Any]:
        """A row for stock vLLM, for never exiting, and for each level."""
        return {
            "stock": row([baseline for baseline, _ in self.rounds]),
            "never_exit": row(self.full),
            "levels": [
                {
                    "epsilon": level.epsilon,
                    **row([by_epsilon[level.epsilon] for _, by_epsilon in self.rounds]),
                }
                for level in self.config.levels
            ],
        }

    def share(self, name: str, hits: Sequence[Any], groups: Ints | None = None) -> dict[str, Any]:
        """The share of `hits`, [rows] for each round, and its interval."""
        groups = self.groups if groups is None else groups
        value, interval = of_rounds([Share.of(np.asarray(one), groups) for one in hits])
        return {name: value, f"{name}_95": interval}

    def by_answer(self) -> dict[str, Any]:
        """``wrong``, what else the promise compares, and of each of its parts what differs.

        Where it reads values, also how far probabilities move, and how good they are: ECE, Brier
        score and bins are None if a prompt has no label.
        """
        promise = self.promise
        truth = None
        if promise.reads_values and self.config.objects is None:  # see `by_field` for those
            truth = true_labels(self.config, self.examples)

        def row(runs: Sequence[Run]) -> dict[str, Any]:
            pairs = [
                (self.outcome(run, run), self.outcome(full, run))
                for run, full in zip(runs, self.full, strict=True)
            ]
            hits, found = [promise.compared(*pair) for pair in pairs], dict[str, Any]()
            for name in hits[0]:
                found |= self.share(name, [one[name] for one in hits])
            moved = [moves for pair in pairs if (moves := promise.moves(*pair)) is not None]
            if moved:
                found |= quality(self.config, runs[0], truth) | {
                    name: statistics.median(float(summary(one.double().numpy())) for one in moved)
                    for name, summary in MOVES.items()
                }
            for part in promise.parts:
                differs = self.share("differs", [part.wrong(*pair) for pair in pairs])
                early = part.probabilities(pairs[0][0])
                found.setdefault(promise.section, []).append({**differs, "early": early})
            return found

        rows = self.rows(row)
        if promise.parts:
            full = self.outcome(self.full[0], self.full[0])
            del rows["never_exit"]
            rows[promise.section] = [
                {**part.reported(), "full": part.probabilities(full)} for part in promise.parts
            ]
        return rows

    def outcome(self, run: Run, answered: Run) -> Outcome:
        """That of a run, in which no label is best where another one `answered` one."""
        assert run.logprobs is not None
        link = self.promise.link
        scores = link.scores_of(torch.from_numpy(run.logprobs).double().exp())
        if self.config.objects is not None:
            values = LabelProbabilities(scores.exp(), torch.ones(len(scores)))
            return Outcome(torch.tensor([code for [code] in run.texts]), scores, values)
        if not self.promise.reads_values:
            return Outcome(scores.argmax(dim=1), scores)
        if not link.one_holds:
            among = torch.from_numpy(np.exp(run.logprobs))
            return Outcome(torch.zeros(len(among)), scores, LabelProbabilities(among, among))
        wide = torch.from_numpy(np.exp(run.logprobs.astype(np.float64)))
        among, mass = (torch.from_numpy(of(run.logprobs)) for of in (among_labels, label_mass))
        ids = list(self.config.label_ids)
        is_label, other = (
            np.isin([text[0] for text in either.texts], ids) for either in (run, answered)
        )
        return Outcome(
            torch.from_numpy(run.logprobs.argmax(axis=1)),
            scores,
            LabelProbabilities(among, mass, wide),
            # Apart from rounding, only an exit can answer a label where no label is best.
            is_label=torch.from_numpy(is_label | ~other),
        )

    def by_query(self) -> dict[str, Any]:
        """Of queries: ``wrong`` (a document is lost), ``changed`` (other first documents), NDCG.

        ``ndcg_lost`` is the mean of 1 - NDCG@10 if full depth's scores are the gains; if all
        documents have labels, ``ndcg`` is the mean NDCG@10 by these.
        """
        examples, promise = self.examples, self.promise
        assert isinstance(promise, FirstDocuments)
        queries = [np.flatnonzero(self.groups == one) for one in np.unique(self.groups)]
        full, alone = [*map(_relevance, self.full)], np.arange(len(queries))
        right = None
        if all(example.label is not None for example in examples):
            right = np.array([float(example.label == YES) for example in examples])

        def other_first(early: Floats, deep: Floats) -> bool:
            first = slice(promise.k)
            return set(ranked(early)[first]) != set(ranked(deep)[first])

        def row(runs: Sequence[Run]) -> dict[str, Any]:
            scores, found = [*map(_relevance, runs)], dict[str, Any]()
            for name, differs in (("wrong", promise.breaks), ("changed", other_first)):
                hits = [
                    [differs(early[own], deep[own]) for own in queries]
                    for early, deep in zip(scores, full, strict=True)
                ]
                found |= self.share(name, hits, alone)
            found["ndcg_lost"] = 1 - _mean_ndcg(queries, full[0], scores[0])
            if right is not None:
                found["ndcg"] = _mean_ndcg(queries, right, scores[0])
            return found

        counts = {"queries": len(queries), "documents": len(examples)}
        return {**counts, **self.rows(row)}


def _relevance(run: Run) -> Floats:
    """[prompts], the scores by which documents are ordered."""
    assert run.logprobs is not None
    scores: Floats = np.exp(run.logprobs[:, -1].astype(np.float64))
    return scores


def _mean_ndcg(queries: Sequence[Ints], gains: Floats, scores: Floats) -> float:
    """The mean NDCG@10 of the orders of `scores`; a single document is in order."""
    found = [
        ndcg_score(gains[own][None], scores[own][None], k=NDCG_AT) if len(own) > 1 else 1.0
        for own in queries
    ]
    return float(np.mean(found))
