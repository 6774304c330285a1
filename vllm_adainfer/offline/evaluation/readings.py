"""What the requests of an evaluation read: the token, or the probabilities of a policy's labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_adainfer.engine.reads import What
from vllm_adainfer.offline.calibration.collect import greedy
from vllm_adainfer.offline.evaluation.probabilities import Logprobs
from vllm_adainfer.policy.artifact import ArtifactConfig, Label

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


def what_is_read(config: ArtifactConfig) -> What:
    """The most that the bound of a policy is about."""
    if config.risk != "probability":
        return What.TOKEN
    return What.IN_VOCABULARY if config.label_mass else What.AMONG_LABELS


def engine_settings(what: What, labels: Sequence[Label]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` without which requests cannot read this."""
    if what is not What.AMONG_LABELS:
        return {}
    return {"logprobs_mode": "processed_logprobs", "max_logprobs": len(labels)}


def request_params(
    what: What, ids: Sequence[int], extra_args: dict[str, Any] | None, max_tokens: int
) -> SamplingParams:
    """Parameters of a greedy request that reads this.

    Args:
        what: is read.
        ids: token ids of its labels; none if any token may be the answer.
        extra_args: of the request.
        max_tokens: counts for tokens alone.

    """
    if what is What.TOKEN:
        return greedy(ids, extra_args, max_tokens)
    from vllm import SamplingParams

    ids = list(ids)
    if what is What.IN_VOCABULARY:
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
