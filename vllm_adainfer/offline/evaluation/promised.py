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
from vllm_adainfer.promise.gates import Gates
from vllm_adainfer.promise.probabilities import LabelProbabilities
from vllm_adainfer.promise.promise import Outcome
from vllm_adainfer.promise.tolerance import Tolerance

DIGITS = 4  # of the probabilities in the report
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

    Args:
        config: the artifact's config.
        examples: the prompts.
        groups: [prompts], the group of each prompt; groups are independent.
        rounds: the runs, all with log-probabilities if the promise is about probabilities.

    Returns:
        ``risk``, and under ``gates``, ``queries`` or ``probabilities`` a row for `stock`, whose
        differences are rounding, one for `never_exit`, and `levels`, with a row for each epsilon
        and the share that is ``wrong``; empty for a promise about answers alone.

    """
    promise = config.promise
    compared = _Compared(config, examples, groups, rounds)
    found: dict[str, Any] = {"risk": "probability"}
    if isinstance(promise, Gates):
        return {**found, "gates": compared.by_gate(promise)}
    if isinstance(promise, FirstDocuments):
        return {**found, "queries": compared.by_query(promise)}
    if isinstance(promise, Tolerance):
        found |= {"tolerance": promise.tolerance, "label_mass": promise.label_mass}
        return {**found, "probabilities": compared.by_move(promise)}
    return {}


def bounded_rows(promised: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of the levels among `promised_rows`, or in a report; None if there are none."""
    for name in ("gates", "queries", "probabilities"):
        if name in promised:
            levels: list[dict[str, Any]] = promised[name]["levels"]
            return levels
    return None


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

    def by_gate(self, promise: Gates) -> dict[str, Any]:
        """``wrong``, and of each gate ``differs`` and the ``early`` probabilities.

        Beside the rows `gates`, each with its name, number and the ``full`` probabilities.
        """
        link, gates = promise.link, promise.gates
        names = [label.name for label in self.config.labels]
        each = [Gates(gates=(gate,)).about(names, link) for gate in gates]

        def outcome(run: Run) -> Outcome:
            assert run.logprobs is not None
            scores = link.scores_of(torch.from_numpy(run.logprobs).double().exp())
            return Outcome(scores.argmax(dim=1), scores)

        def probabilities(alone: Gates, run: Run) -> list[float]:
            scores, [gate] = outcome(run).scores, alone.gates
            assert scores is not None
            odds = float(np.log(gate.probability / (1 - gate.probability)))
            margins = alone.margins(scores).squeeze(1).double() + odds
            return [round(one, DIGITS) for one in margins.sigmoid().tolist()]

        def wrong(by: Gates, runs: Sequence[Run]) -> list[torch.Tensor]:
            pairs = zip(runs, self.full, strict=True)
            return [by.wrong(outcome(run), outcome(full)) for run, full in pairs]

        def row(runs: Sequence[Run]) -> dict[str, Any]:
            by_gate = [
                {
                    **self.share("differs", wrong(one, runs)),
                    "early": probabilities(one, runs[0]),
                }
                for one in each
            ]
            return {**self.share("wrong", wrong(promise, runs)), "gates": by_gate}

        found = [
            {
                "label": gate.label or "the best label",
                "probability": gate.probability,
                "full": probabilities(one, self.full[0]),
            }
            for gate, one in zip(gates, each, strict=True)
        ]
        rows = self.rows(row)
        return {"gates": found, "stock": rows["stock"], "levels": rows["levels"]}

    def by_move(self, promise: Tolerance) -> dict[str, Any]:
        """``wrong``, ``label_differs``, how far probabilities move, and how good they are.

        ECE, Brier score and bins are None if a prompt has no label.
        """
        config, one_holds = self.config, promise.link.one_holds
        truth, ids = true_labels(config, self.examples), list(config.label_ids)

        def outcome(run: Run, answered: Run) -> Outcome:
            """That of a run, in which no label is best where another one `answered` one."""
            assert run.logprobs is not None
            if not one_holds:
                among = torch.from_numpy(np.exp(run.logprobs))
                return Outcome(torch.zeros(len(among)), labels=LabelProbabilities(among, among))
            wide = torch.from_numpy(np.exp(run.logprobs.astype(np.float64)))
            among, mass = (torch.from_numpy(of(run.logprobs)) for of in (among_labels, label_mass))
            is_label, other = (
                np.isin([text[0] for text in either.texts], ids) for either in (run, answered)
            )
            return Outcome(
                torch.from_numpy(run.logprobs.argmax(axis=1)),
                labels=LabelProbabilities(among, mass, wide),
                # Apart from rounding, only an exit can answer a label where no label is best.
                is_label=torch.from_numpy(is_label | ~other),
            )

        def row(runs: Sequence[Run]) -> dict[str, Any]:
            pairs = [
                (outcome(run, run), outcome(full, run))
                for run, full in zip(runs, self.full, strict=True)
            ]
            found, moves = quality(config, runs[0], truth), [promise.moves(*pair) for pair in pairs]
            for name, summary in MOVES.items():
                found[name] = statistics.median(
                    float(summary(one.double().numpy())) for one in moves
                )
            differs = [early.best != full.best for early, full in pairs]
            wrong = [promise.wrong(*pair) for pair in pairs]
            return found | self.share("label_differs", differs) | self.share("wrong", wrong)

        return self.rows(row)

    def by_query(self, promise: FirstDocuments) -> dict[str, Any]:
        """Of queries: ``wrong`` (a document is lost), ``changed`` (other first documents), NDCG.

        ``ndcg_lost`` is the mean of 1 - NDCG@10 if full depth's scores are the gains; if all
        documents have labels, ``ndcg`` is the mean NDCG@10 by these.
        """
        examples = self.examples
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
        return {"k": promise.k, "margin": promise.margin, **counts, **self.rows(row)}


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
