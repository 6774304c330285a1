"""What the policy has said in one step, kept until it is known who leaves with it."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_adainfer.decision.policy import ExitPolicy
from vllm_adainfer.runtime.step import StepContext
from vllm_adainfer.runtime.stream import Stream


class Decisions:
    """Asks the policy about a step's requests, at one exit point after the other.

    Attributes:
        answers: [requests, ...], as in `Decision`, filled where settled; None before the first.

    """

    answers: Tensor | None = None

    def __init__(self, policy: ExitPolicy, step: StepContext) -> None:
        self._policy = policy
        self._step = step
        self._memory: Tensor | None = None

    def ask(self, exit_index: int, stream: Stream) -> None:
        """Ask about those in the batch who may exit and are not settled; settle who now is."""
        step = self._step
        asked = step.undecided()
        if asked.size == 0:
            return
        tags = torch.from_numpy(step.tags[asked])
        if len(asked) < stream.num_rows:  # else tokens are generated: every row is asked about
            stream = stream.rows(step.sampled_rows(asked))
        decision = self._policy.decide(exit_index, stream.whole(), tags, self._memory)
        if decision.memory is not None:  # who is not settled is asked next, in this order
            self._memory = decision.memory[~decision.settled]
        settled = asked[decision.settled.numpy()]
        if settled.size == 0 or decision.answers is None:
            return
        if self.answers is None:
            self.answers = decision.answers.new_empty(step.num_requests, decision.answers.shape[1])
        self.answers[torch.from_numpy(settled)] = decision.answers[decision.settled]
        step.settle(settled)
