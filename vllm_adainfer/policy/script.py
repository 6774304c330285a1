"""A policy that asks no one: each request says where it leaves, for benchmarks and tests of speed.

It probes as a label head does, so that a step costs what it would cost a calibrated policy; what
it answers means nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_adainfer.policy.exit_policy import Decision
from vllm_adainfer.policy.probe import Probe

SCRIPT_LABELS = (0, 1)  # the token ids that a scripted request must be restricted to


class ScriptedPolicy:
    """Settles a request at the exit point (an index) that is its tag."""

    def __init__(self, exit_points: tuple[int, ...], hidden_size: int, device: torch.device):
        """Random numbers stand for what a label head of this size has fitted."""
        self.exit_points = exit_points
        self.num_tags = len(exit_points)
        self.answer_ids: Tensor | None = torch.tensor(SCRIPT_LABELS, device=device)
        self.restricted = True
        self._classifier = torch.zeros(3, dtype=torch.float32, device=device)
        generator = torch.Generator().manual_seed(0)
        head = torch.randn(
            len(SCRIPT_LABELS), hidden_size, generator=generator, dtype=torch.float32
        )
        self._probe = Probe(
            head_weight=head.to(device),
            head_bias=torch.zeros(len(SCRIPT_LABELS), dtype=torch.float32, device=device),
            token_ids=self.answer_ids,
        )

    def decide(
        self, exit_index: int, hidden: Tensor, tags: Tensor, memory: Tensor | None
    ) -> Decision:
        """See `ExitPolicy.decide`."""
        readout = self._probe.readout(hidden)
        threshold = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        _, scores = self._probe.settle(readout, self._classifier, threshold)
        return Decision(tags <= exit_index, scores)
