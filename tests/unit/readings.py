"""What `explain` shows of a policy, beside what the policy decides."""

from __future__ import annotations

from typing import Any

import torch

from vllm_adainfer.policy.exit_policy import Decision, UndecidedRows


def views_as_it_decides(policy: Any, index: int, rows: UndecidedRows, decision: Decision) -> bool:
    """Whether `view` has the answers and the scores that `decide` has."""
    view = policy.view(index, rows)
    best = policy.answer_ids[decision.answers.scores.argmax(dim=1)]
    reaches = view.odds >= view.threshold
    return (
        torch.equal(view.tokens, best)
        and not (decision.settled & ~reaches).any()
        and bool((view.gap <= view.top_prob).all())
    )
