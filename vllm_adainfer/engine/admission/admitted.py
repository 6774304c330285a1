"""What a worker remembers of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.kinds import NotCovered
from vllm_adainfer.engine.admission.resolved import Resolved
from vllm_adainfer.settings.engine import NO_POLICY

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NOT_RECORDED = NOT_POOLED = -1


@dataclass(frozen=True)
class Admitted:
    """What the worker remembers of a request.

    Attributes:
        resolved: what the scheduler resolved on arrival.
        threshold_row: the row of the thresholds that applies, numbered across policies (with a
            script, the index of the exit point); `FULL_DEPTH` if it may not exit.
        subset: the labels to choose among, as bits over the policy's labels; `ALL` for a policy
            without a label pool.
        certified_tokens: how many of its first tokens its policy's bound covers.
        has_choice_policy: whether a policy for choices decides it.
        answers_stand: whether its policy's answers do, see `ArtifactConfig.answers_stand`.
        pooled_from: the position from which on its policy pools its prompt; `NOT_POOLED` if it
            reads the last token alone, or if the prompt is not longer.
        last_token_row: the row of the thresholds if the prompt cannot be pooled as a whole.
        text: what its policy's student reads of its prompt, in the student's tokens; empty if it is
            not asked.
        prompt: token ids of its prompt.
        adapter: its LoRA adapter; None for the base model.
        record_row: its line of the calibration data; `NOT_RECORDED` if it has none.
        policy: the name of the policy for its output; `NO_POLICY` if there is none.
        not_covered: why that policy does not serve its prompt; None if it does.

    """

    resolved: Resolved
    threshold_row: int
    subset: int
    certified_tokens: int
    has_choice_policy: bool
    answers_stand: bool
    pooled_from: int
    last_token_row: int
    text: Sequence[int]
    prompt: Sequence[int]
    adapter: LoRARequest | None
    record_row: int
    policy: str = NO_POLICY
    not_covered: NotCovered | None = None
