"""The report's rows about queries: how often an order loses a document, and how good orders are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import ndcg_score

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.score_labels import YES
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Rounds, Run
from vllm_adainfer.offline.reports.shares import Share, of_rounds
from vllm_adainfer.promise.first_documents import loses_document, ranked

NDCG_AT = 10


def query_rows(
    config: ArtifactConfig, examples: Sequence[Example], groups: Ints, rounds: Rounds
) -> dict[str, Any]:
    """How the order of each query's documents differs from never exiting in the same round.

    Shares are medians over the rounds, as the report's disagreement is; NDCG is that of the first
    round.

    Args:
        config: config of an artifact that promises first documents.
        examples: the prompts, each a pair of a query and a document.
        groups: [prompts], the query of each.
        rounds: the runs, all with log-probabilities.

    Returns:
        ``k``, ``margin``, ``queries`` and ``documents`` (their number); a row for `stock`, whose
        differences are rounding, one for `never_exit`, and `levels`, with a row for each epsilon.
        A row has the shares of queries ``wrong`` (a document is lost) and ``changed`` (other first
        k documents), and ``ndcg_lost``, the mean of 1 - NDCG@10 if full depth's scores are the
        gains; and if all documents have labels ``ndcg``, the mean NDCG@10 by these.

    """
    top_k = config.top_k
    assert top_k is not None
    queries = [np.flatnonzero(groups == one) for one in np.unique(groups)]
    full = [_scores(by_epsilon[NEVER_EXIT]) for _, by_epsilon in rounds]
    right = None
    if all(example.label is not None for example in examples):
        right = np.array([float(example.label == YES) for example in examples])

    def loses(early: Floats, deep: Floats) -> bool:
        return loses_document(early, deep, top_k)

    def other_first(early: Floats, deep: Floats) -> bool:
        first = slice(top_k.k)
        return set(ranked(early)[first]) != set(ranked(deep)[first])

    def row(runs: Sequence[Run]) -> dict[str, Any]:
        scores = [*map(_scores, runs)]
        found = {
            **_share("wrong", queries, scores, full, loses),
            **_share("changed", queries, scores, full, other_first),
            "ndcg_lost": 1 - _mean_ndcg(queries, full[0], scores[0]),
        }
        if right is not None:
            found["ndcg"] = _mean_ndcg(queries, right, scores[0])
        return found

    return {
        "k": top_k.k,
        "margin": top_k.margin,
        "queries": len(queries),
        "documents": len(examples),
        "stock": row([baseline for baseline, _ in rounds]),
        "never_exit": row([by_epsilon[NEVER_EXIT] for _, by_epsilon in rounds]),
        "levels": [
            {
                "epsilon": level.epsilon,
                **row([by_epsilon[level.epsilon] for _, by_epsilon in rounds]),
            }
            for level in config.levels
        ],
    }


def _scores(run: Run) -> Floats:
    """[prompts], the scores by which documents are ordered."""
    assert run.logprobs is not None
    scores: Floats = np.exp(run.logprobs[:, -1].astype(np.float64))
    return scores


def _share(
    name: str,
    queries: Sequence[Ints],
    ours: Sequence[Floats],
    full: Sequence[Floats],
    differs: Callable[[Floats, Floats], bool],
) -> dict[str, Any]:
    """The share of queries whose scores differ, and its interval."""
    every = np.arange(len(queries))
    hits = [
        np.array([float(differs(early[own], deep[own])) for own in queries])
        for early, deep in zip(ours, full, strict=True)
    ]
    value, interval = of_rounds([Share(one, np.ones(len(queries)), every) for one in hits])
    return {name: value, f"{name}_95": interval}


def _mean_ndcg(queries: Sequence[Ints], gains: Floats, scores: Floats) -> float:
    """The mean NDCG@10 of the orders of `scores`; a single document is in order."""
    found = [
        ndcg_score(gains[own][None], scores[own][None], k=NDCG_AT) if len(own) > 1 else 1.0
        for own in queries
    ]
    return float(np.mean(found))
