"""Compile the probe kernels at start-up instead of in the first steps."""

from __future__ import annotations

import torch
from adainfer_kernels import pool, rows_to_compile_for

from vllm_adainfer.artifact.label_subsets import ALL
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet


@torch.inference_mode()
def warm_up(policies: PolicySet, states: torch.Tensor) -> None:
    """Run all `policies` on rows of `states` [max requests, hidden size] and drop the decisions."""
    if policies.has_pooled:
        starts = torch.arange(len(states), device=states.device)
        for residual in None, states:
            for carried in None, torch.zeros_like(states, dtype=torch.float32):
                pool(states, residual, starts, starts + 1, carried)
    for rows in rows_to_compile_for(len(states)):
        hidden = states[:rows]
        threshold_rows = torch.zeros(rows, dtype=torch.int64, device=states.device)
        subsets = torch.full_like(threshold_rows, ALL)
        for policy in policies.policies:
            memory = None
            for exit_index in range(len(policy.exit_points)):
                read = torch.cat([hidden, hidden], 1).float() if policy.is_pooled else hidden
                undecided = UndecidedRows(read, threshold_rows, memory, subsets)
                memory = policy.decide(exit_index, undecided).memory
