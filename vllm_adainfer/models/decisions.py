"""What the policy has said in one step, kept until it is known who leaves with it."""

from __future__ import annotations

from torch import Tensor

from vllm_adainfer.decision.policy import ExitPolicy
from vllm_adainfer.models.agreement import agreed
from vllm_adainfer.runtime.step import StepContext
from vllm_adainfer.runtime.stream import Stream


class Decisions:
    """Asks the policy about a step's requests, at one exit point after the other.

    Attributes:
        answers: [requests, ...], as in `Decision`, defined where settled; None before the first.

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
        if asked.size == 0:  # then nothing is read, either
            return
        places, tags, rows = step.on_device(asked, step.tags[asked], step.sampled_rows(asked))
        if len(asked) < stream.num_rows:  # else tokens are generated: every row is asked about
            stream = stream.rows(rows)
        memory = None if self._memory is None else self._memory[places]
        decision = self._policy.decide(exit_index, stream.whole(), tags, memory)
        if decision.memory is not None:
            self._memory = self._put(self._memory, places, decision.memory)
        if decision.answers is None:
            return
        # Of those that are not settled, too: to pick the others out, the device would have to wait.
        self.answers = self._put(self.answers, places, decision.answers)
        settled = agreed(decision.settled).cpu()  # the one read of an exit point
        step.settle(asked[settled.numpy()])

    def _put(self, kept: Tensor | None, places: Tensor, values: Tensor) -> Tensor:
        """`kept` [requests, ...], made if there is none, with `values` at `places`."""
        if kept is None:
            kept = values.new_empty(self._step.num_requests, *values.shape[1:])
        kept[places] = values
        return kept
