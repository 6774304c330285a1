"""A scripted policy, for benchmarks and tests: each request names its own exit point.

It runs the probe of a label head, so that a step costs as much as with a calibrated policy. Its
answers mean nothing.
"""

from __future__ import annotations

import adainfer_kernels
import torch
from adainfer_kernels import Head
from typing_extensions import override

from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.probe import Probe

SCRIPT_LABELS = (0, 1)  # the only token ids that a scripted request may produce


class ScriptedPolicy(ExitPolicy):
    """Settles a request at the exit point whose index is the request's threshold row."""

    def __init__(self, exit_points: tuple[int, ...], hidden_size: int, device: torch.device):
        """Fill a label head of this size with random numbers."""
        self.exit_points = exit_points
        self.num_threshold_rows = len(exit_points)
        self.probe_inputs = (ProbeInput.LAST_TOKEN,) * len(exit_points)
        self.answer_ids = torch.tensor(SCRIPT_LABELS, device=device)
        self._classifier = torch.zeros(3, dtype=torch.float32, device=device)
        generator = torch.Generator().manual_seed(0)
        size = len(SCRIPT_LABELS)
        head = torch.randn(size, hidden_size, generator=generator, dtype=torch.float32)
        bias = torch.zeros(size, dtype=torch.float32, device=device)
        probe = Probe(Head(head.to(device), bias), token_ids=self.answer_ids)
        self.probes = [probe] * len(exit_points)

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        probe = self.probes[exit_index]
        readout = probe.readout(rows.hidden)
        threshold = torch.zeros(len(rows.hidden), dtype=torch.float32, device=rows.hidden.device)
        _, scores = adainfer_kernels.settle(readout, probe.head, self._classifier, threshold)
        answers = Answers(scores, self.answer_ids, of_labels=True)
        return Decision(rows.threshold_rows <= exit_index, answers)
