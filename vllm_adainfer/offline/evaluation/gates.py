"""The report's rows about gates: how often a probability is on the other side of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Rounds, Run
from vllm_adainfer.offline.reports.shares import Share, of_rounds
from vllm_adainfer.promise.gates import Gates
from vllm_adainfer.promise.links import Link, link_of
from vllm_adainfer.promise.promise import Outcome

DIGITS = 4  # of the probabilities in the report


def gate_rows(config: ArtifactConfig, groups: Ints, rounds: Rounds) -> dict[str, Any]:
    """How often answers are on the other side of a gate than never exiting in the same round.

    Shares are medians over the rounds, as the report's disagreement is; probabilities are those of
    the first round.

    Args:
        config: config of an artifact with gates.
        groups: [prompts], the group of each prompt; groups are independent.
        rounds: the runs, all with log-probabilities.

    Returns:
        a row for `stock`, whose differences are rounding, and `levels`, with a row for each
        epsilon: ``wrong``, and ``gates`` with ``differs`` and the ``early`` probabilities of each;
        and `gates`, each with its name, number and the ``full`` probabilities.

    """
    link = link_of(config.score_head)
    every = Gates(config.gates, config.labels, link)
    each = [Gates([gate], config.labels, link) for gate in config.gates]
    full = [by_epsilon[NEVER_EXIT] for _, by_epsilon in rounds]

    def share(gates: Gates, runs: Sequence[Run], name: str) -> dict[str, Any]:
        pairs = zip(runs, full, strict=True)
        wrong = [
            gates.wrong(_outcome(link, run), _outcome(link, other)).double().numpy()
            for run, other in pairs
        ]
        value, interval = of_rounds([Share(one, np.ones(len(one)), groups) for one in wrong])
        return {name: value, f"{name}_95": interval}

    def row(runs: Sequence[Run]) -> dict[str, Any]:
        return {
            **share(every, runs, "wrong"),
            "gates": [
                {
                    **share(gates, runs, "differs"),
                    "early": _probabilities(gates, odds, _scores(link, runs[0])),
                }
                for gates, odds in zip(each, _odds(config), strict=True)
            ],
        }

    return {
        "gates": [
            {
                "label": gate.label or "the best label",
                "probability": gate.probability,
                "full": _probabilities(gates, odds, _scores(link, full[0])),
            }
            for gate, gates, odds in zip(config.gates, each, _odds(config), strict=True)
        ],
        "stock": row([baseline for baseline, _ in rounds]),
        "levels": [
            {
                "epsilon": level.epsilon,
                **row([by_epsilon[level.epsilon] for _, by_epsilon in rounds]),
            }
            for level in config.levels
        ],
    }


def _outcome(link: Link, run: Run) -> Outcome:
    scores = _scores(link, run)
    return Outcome(scores.argmax(dim=1), scores)


def _scores(link: Link, run: Run) -> torch.Tensor:
    """[prompts, labels], scores that have the probabilities of the answers."""
    assert run.logprobs is not None
    return link.scores_of(torch.from_numpy(run.logprobs).double().exp())


def _odds(config: ArtifactConfig) -> Floats:
    chances = np.array([gate.probability for gate in config.gates])
    odds: Floats = np.log(chances / (1 - chances))
    return odds


def _probabilities(gates: Gates, odds: float, scores: torch.Tensor) -> list[float]:
    """The probability of the label of a single gate, [prompts]."""
    margins = gates.margins(scores).squeeze(1).double() + odds
    return [round(one, DIGITS) for one in margins.sigmoid().tolist()]
