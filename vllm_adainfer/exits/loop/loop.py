"""What runs a model's stack: the protocol of the exit loop and of the recording loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.batch.batch import Batch
from vllm_adainfer.exits.loop.shadow import ShadowAnswers
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.policy.answers import EarlyScores


@dataclass(frozen=True)
class ScoredRequests:
    """Requests whose answers are scores, for `compute_logits`.

    Attributes:
        requests: [answered], their places in the step's batch.
        answers: the answer of each, in the same order.

    """

    requests: Ints
    answers: EarlyScores


@dataclass(frozen=True)
class StepOutput:
    """The result of a step.

    Attributes:
        hidden: [rows, head size], the input of vLLM's own `compute_logits`; defined only in the
            rows that yield a token.
        scored: answers that are scores, by policy.
        shadows: early answers of shadow requests, by policy.

    """

    hidden: Tensor
    scored: tuple[ScoredRequests, ...] = ()
    shadows: tuple[ShadowAnswers, ...] = ()


class Loop(Protocol):
    """Runs a model's stack, step by step.

    Attributes:
        stats: the counters so far.

    """

    stats: ExitStats

    @property
    def defers(self) -> bool:
        """Whether rows that exit run the layers they skipped in a later step."""

    def run(self, batch: Batch, input_ids: Tensor, step: StepContext) -> StepOutput:
        """Run one step.

        Args:
            batch: the rows that the step came with.
            input_ids: int32 or int64 [rows], possibly with padding at the end.
            step: the requests of these rows, and which of them may exit.

        """

    def overdue(self) -> set[str]:
        """Requests that must run the next step at full depth."""

    def tightened(self) -> Bools | None:
        """True for threshold rows whose requests run at full depth unless they are shadow requests.

        None where there is no monitor, so that no request is a shadow request.
        """

    def missing(self, request_id: str, end: int) -> int:
        """How many of a request's last positions before `end` are not cached as at full depth."""

    def forget(self, request_id: str) -> None:
        """A request has ended, or its keys and values were thrown away."""

    def ended(self, request_id: str) -> None:
        """A request gets no more tokens, whether or not it ever ran."""

    def reset_counters(self) -> None:
        """Start all counters from 0."""
