"""Warm-up of policies: no step waits until a kernel is compiled, and none runs an untested one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from adainfer_kernels import pool, rows_to_compile_for

from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.engine.compat.warm_up import compiling_is_expected
from vllm_adainfer.engine.self_test.kernels import wrong_kernels
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.promise.label_subsets import ALL

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


def prepare(policies: PolicySet, states: torch.Tensor) -> None:
    """Compile and test the kernels of `policies` that come after the start, beside the steps.

    `states` are as in `warm_up`, and are overwritten. An AdaInferError if a kernel is wrong here.
    """
    with compiling_is_expected():
        warm_up(policies, states)
        why = wrong_kernels(policies, states)
    if why is not None:
        raise AdaInferError(
            f"the kernels of {', '.join(policies.names[:-1])} give other results than torch on "
            f"this device ({why}), so it is not served: please report it"
        )


@contextmanager
def beside_the_steps(device: torch.device) -> Iterator[None]:
    """Use `device` in a stream of its own; at the end, all that was asked for there is done."""
    if device.type == "cpu":
        yield
        return
    stream = torch.Stream(device)
    with stream:
        yield
    stream.synchronize()
