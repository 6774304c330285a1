"""What `explain` and shadow requests show of a policy, beside what the policy decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from vllm_adainfer.exits.accounting.counters import PolicyStats
from vllm_adainfer.exits.loop.shadow import ShadowAnswers
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.promise.promise import Outcome
from vllm_adainfer.transfers import HostCopy


def outcomes(*scores: torch.Tensor) -> list[Outcome]:
    """What rows with each of these scores of labels [rows, labels] are answered with."""
    return [Outcome(one.argmax(dim=1), one) for one in scores]


class Compared(ExitPolicy):
    """A policy of which answers are compared, and nothing is decided."""

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        raise NotImplementedError

    @override
    def best_labels(self, logits: torch.Tensor, subsets: torch.Tensor | None) -> torch.Tensor:
        return logits.argmax(dim=1)


def compare(
    monitor: Any,
    policy: Any,
    answers: Any,
    logits: torch.Tensor,
    levels: Sequence[int],
    settled: Sequence[bool] | None = None,
    ids: Sequence[str] | None = None,
    stats: PolicyStats | None = None,
) -> PolicyStats:
    """Compare shadow requests, the rows of `logits`; those that are `settled` have `answers`."""
    stats = PolicyStats() if stats is None else stats
    places = np.arange(len(levels))
    early = np.full(len(levels), True) if settled is None else np.array(settled)
    ShadowAnswers(
        name="guard",
        policy=policy,
        monitor=monitor,
        stats=stats,
        request_ids=ids or [str(place) for place in places],
        levels=np.array(levels),
        settled=early,
        everyone=places,
        requests=torch.from_numpy(places[early]),
        subsets=None,
        answers=answers,
        send=HostCopy,
    ).compare(logits, _no_head).judge()
    return stats


def _no_head(states: torch.Tensor) -> torch.Tensor:
    raise AssertionError("label scores need no head")
