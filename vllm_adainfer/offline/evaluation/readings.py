"""What the requests of an evaluation read: a token, a choice, or the probabilities of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_adainfer.artifact.config import ArtifactConfig, Choice, Label
from vllm_adainfer.engine.admission.requested_output import OutputKind
from vllm_adainfer.offline.calibration.collect import greedy
from vllm_adainfer.offline.evaluation.probabilities import Logprobs

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


def what_is_read(config: ArtifactConfig) -> OutputKind:
    """The most that the bound of a policy is about."""
    if config.choices:
        return OutputKind.CHOICE
    if config.risk != "probability":
        return OutputKind.TOKEN
    return OutputKind.IN_VOCABULARY if config.label_mass else OutputKind.AMONG_LABELS


def engine_settings(what: OutputKind, labels: Sequence[Label]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` without which requests cannot read this."""
    if what is not OutputKind.AMONG_LABELS:
        return {}
    return {"logprobs_mode": "processed_logprobs", "max_logprobs": len(labels)}


def request_params(
    what: OutputKind, ids: Sequence[int], extra_args: dict[str, Any] | None, max_tokens: int
) -> SamplingParams:
    """Parameters of a greedy request that reads this.

    Args:
        what: is read.
        ids: token ids of its labels; none if any token may be the answer.
        extra_args: of the request.
        max_tokens: counts for tokens alone.

    """
    if what is OutputKind.TOKEN:
        return greedy(ids, extra_args, max_tokens)
    from vllm import SamplingParams

    ids = list(ids)
    if what is OutputKind.IN_VOCABULARY:
        return SamplingParams(
            temperature=0, max_tokens=1, logprob_token_ids=ids, extra_args=extra_args
        )
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        allowed_token_ids=ids,
        logprobs=len(ids),
        extra_args=extra_args,
    )


def choice_params(
    choices: Sequence[Choice], extra_args: dict[str, Any] | None = None
) -> SamplingParams:
    """Parameters of a greedy request for one of `choices`, with room for any of them."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    texts = [choice.text for choice in choices]
    return SamplingParams(
        temperature=0,
        max_tokens=room_for(choices),
        structured_outputs=StructuredOutputsParams(choice=texts),
        extra_args=extra_args,
    )


def room_for(choices: Sequence[Choice]) -> int:
    """The most tokens that a request for one of `choices` may take.

    A model may write a text in more tokens than its tokenizer does, and then the end.
    """
    return max(len(choice.text.encode()) for choice in choices) + 1


def chosen(outputs: Sequence[RequestOutput], choices: Sequence[Choice]) -> list[list[int]]:
    """For each prompt, the tokens of the choice as its tokenizer writes it."""
    tokens = {choice.text: list(choice.token_ids) for choice in choices}
    return [tokens[output.outputs[0].text] for output in outputs]


def label_logprobs(outputs: Sequence[RequestOutput], labels: Sequence[Label]) -> Logprobs:
    """The labels' log-probabilities for each prompt, [prompts, labels], in the order of `labels`.

    `outputs` are those of requests that read them; -inf is for labels that a request does not name.
    """
    firsts = [output.outputs[0].logprobs[0] for output in outputs]
    ids = [label.token_id for label in labels]
    rows = [
        [first[token].logprob if token in first else -np.inf for token in ids] for first in firsts
    ]
    return np.array(rows, dtype=np.float32)
