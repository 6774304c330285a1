"""Before the first request, every policy has decided batches of all sizes to compile for."""

from __future__ import annotations

import torch
from adainfer_kernels import rows_to_compile_for

from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.engine.worker.warm_up import warm_up
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet


class Chain(ExitPolicy):
    """A policy with a memory, which notes what it has decided."""

    num_threshold_rows = 2

    def __init__(self, exit_points: tuple[int, ...]) -> None:
        self.exit_points = exit_points
        self.probe_inputs = (ProbeInput.LAST_TOKEN,) * len(exit_points)
        self.decided: list[tuple[int, int, float | None]] = []

    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        count = len(rows.hidden)
        assert len(rows.threshold_rows) == len(rows.subsets) == count
        memory = None if rows.memory is None else float(rows.memory[0])
        self.decided.append((exit_index, count, memory))
        memory_after = torch.full((count,), float(exit_index))
        return Decision(rows.threshold_rows > 0, Answers(rows.hidden), memory_after)


def test_every_policy_decides_at_its_exit_points_with_the_memory_of_the_last():
    policies = {"a": Chain((2, 4)), "b": Chain((3,))}
    warm_up(PolicySet(policies), torch.zeros(20, 8))
    rows = rows_to_compile_for(20)
    assert policies["a"].decided == [one for n in rows for one in ((0, n, None), (1, n, 0.0))]
    assert policies["b"].decided == [(0, n, None) for n in rows]
