"""Compile the probe kernels at start-up instead of in the first steps."""

from __future__ import annotations

import numpy as np
import torch
from adainfer_kernels import pool, rows_to_compile_for

from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.artifact.label_subsets import ALL
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet

TEXT = (1,) * 16  # for a student


@torch.inference_mode()
def warm_up(policies: PolicySet, states: torch.Tensor) -> None:
    """Run all `policies` on rows of `states` [max requests, hidden size] and drop the decisions."""
    if policies.reads(ProbeInput.PROMPT):
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
            for exit_index, read in enumerate(policy.probe_inputs):
                pooled = read is ProbeInput.PROMPT
                state = torch.cat([hidden, hidden], 1).float() if pooled else hidden
                texts = [TEXT] * rows if read is ProbeInput.TEXT else ()
                lens = np.ones(rows, dtype=np.int64)
                if read is ProbeInput.OWN_STATES:
                    state = policy.probes[exit_index].project(hidden)
                undecided = UndecidedRows(state, threshold_rows, memory, subsets, texts, lens)
                memory = policy.decide(exit_index, undecided).memory
