"""What runs a model's stack over a step: the protocol of the exit loop and the recording loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vllm_adainfer.exits.batch import Batch
from vllm_adainfer.exits.counters import ExitStats
from vllm_adainfer.exits.layout import Bools, Ints
from vllm_adainfer.exits.shadow import ShadowAnswers
from vllm_adainfer.exits.step import StepContext


@dataclass(frozen=True)
class ScoredAnswers:
    """Requests that a policy answered with scores of some tokens, for `compute_logits`.

    Attributes:
        requests: [answered], places in the step's batch.
        scores: fp32 [answered, answer ids] of the LM head's scores; or, with one more column, the
            logits of those tokens and that of every other one.
        answer_ids: int64 [answer ids], those tokens.

    """

    requests: Ints
    scores: Tensor
    answer_ids: Tensor

    @property
    def are_logits(self) -> bool:
        """Whether the scores are logits, with that of every other token."""
        return self.scores.shape[1] > len(self.answer_ids)


@dataclass(frozen=True)
class StepOutput:
    """The result of a step.

    Attributes:
        hidden: [rows, head size] for vLLM's own `compute_logits`; defined only in the rows that
            decide a request.
        scored: answers given as scores, for each policy that gave some.
        shadows: early answers of shadow requests, for each policy that has some.

    """

    hidden: Tensor
    scored: tuple[ScoredAnswers, ...] = ()
    shadows: tuple[ShadowAnswers, ...] = ()


class Loop(Protocol):
    """Runs a model's stack over one step after the other.

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
            batch: the step's rows, as they came.
            input_ids: int32 or int64 [rows], possibly padded: the last rows then belong to no
                request.
            step: whose rows these are, and which requests may exit.

        """

    def overdue(self) -> set[str]:
        """Requests that must run the next step at full depth."""

    def tightened(self) -> Bools | None:
        """[tags], the tags whose requests run at full depth unless they are shadow requests.

        None where nobody watches, so that no request is a shadow request.
        """

    def missing(self, request_id: str, end: int) -> int:
        """How many of a request's last positions before `end` are not cached as at full depth."""

    def forget(self, request_id: str) -> None:
        """A request has ended, or its keys and values were thrown away."""

    def ended(self, request_id: str) -> None:
        """A request gets no more tokens, whether or not it ever ran."""

    def reset_counters(self) -> None:
        """Start all counters from 0."""
