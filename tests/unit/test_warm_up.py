"""Before the first request, every policy has been asked about all that it may be asked about."""

from __future__ import annotations

import torch
from adainfer_kernels import rows_to_compile_for

from vllm_adainfer.engine.worker.warm_up import warm_up
from vllm_adainfer.policy.exit_policy import Asked, Decision
from vllm_adainfer.policy.policy_set import PolicySet


class Chain:
    """A policy that remembers, and notes what it was asked."""

    num_tags, answer_ids, restricted = 2, None, False

    def __init__(self, exit_points: tuple[int, ...]) -> None:
        self.exit_points = exit_points
        self.asked: list[tuple[int, int, float | None]] = []

    def decide(self, exit_index: int, asked: Asked) -> Decision:
        rows = len(asked.hidden)
        assert len(asked.tags) == len(asked.subsets) == rows
        memory = None if asked.memory is None else float(asked.memory[0])
        self.asked.append((exit_index, rows, memory))
        return Decision(asked.tags > 0, None, memory=torch.full((rows,), float(exit_index)))


def test_every_policy_is_asked_at_its_exit_points_with_the_memory_of_the_last():
    policies = {"a": Chain((2, 4)), "b": Chain((3,))}
    warm_up(PolicySet(policies), torch.zeros(20, 8))
    rows = rows_to_compile_for(20)
    assert policies["a"].asked == [ask for n in rows for ask in ((0, n, None), (1, n, 0.0))]
    assert policies["b"].asked == [(0, n, None) for n in rows]
