"""What `explain` shows of a policy, beside what the policy decides."""

from __future__ import annotations

from typing import Any

import torch

from vllm_adainfer.policy.exit_policy import Asked, Decision


def reads_as_it_decides(policy: Any, index: int, asked: Asked, decision: Decision) -> bool:
    """Whether `read` has the answers and the scores that `decide` has."""
    read = policy.read(index, asked)
    best = policy.answer_ids[decision.answers[:, : len(policy.answer_ids)].argmax(dim=1)]
    reaches = read.odds >= read.threshold
    return (
        torch.equal(read.tokens, best)
        and not (decision.settled & ~reaches).any()
        and bool((read.gap <= read.top_prob).all())
    )
