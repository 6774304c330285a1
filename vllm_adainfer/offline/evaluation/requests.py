"""The requests of an evaluation: for a token, a choice, an object, or probabilities of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Choice, Label
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.offline.calibration.data.served_schema import longest_object
from vllm_adainfer.offline.calibration.record.collect import greedy, scores_of
from vllm_adainfer.offline.calibration.record.values import best_tokens, values_of_answers
from vllm_adainfer.offline.evaluation.run import Logprobs

if TYPE_CHECKING:
    from vllm import PoolingParams, PoolingRequestOutput, RequestOutput, SamplingParams


def engine_settings(config: ArtifactConfig) -> dict[str, Any]:
    """The `vllm.LLM` arguments that the requests need."""
    form = Output.of_config(config).form
    if form is Form.OBJECT_PROBABILITIES:
        return {"max_logprobs": _best_tokens(config)}
    if form is not Form.AMONG_LABELS:
        return {}
    return {"logprobs_mode": "processed_logprobs", "max_logprobs": len(config.labels)}


def request_params(
    config: ArtifactConfig,
    labels: Sequence[int] | None,
    extra_args: dict[str, Any] | None,
    max_tokens: int = 1,
    schema: str | None = None,
) -> SamplingParams | PoolingParams:
    """Parameters of a greedy request for the output that the policy's bound covers.

    `labels` are ids of those that the request names; None for those of the artifact. `schema` is
    that of the object that it asks for.
    """
    form, ids = Output.of_config(config).form, list(labels or config.label_ids)
    if form is Form.SCORES:
        return scores_of(extra_args)
    if form is Form.TOKEN:
        return greedy(ids, extra_args, max_tokens)
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    max_tokens = most_tokens(config, max_tokens)
    if form is Form.CHOICE:
        choices = StructuredOutputsParams(choice=[choice.text for choice in config.choices])
        asked: dict[str, Any] = {"structured_outputs": choices}
    elif config.objects is not None:
        assert schema is not None, "requests for objects have one"
        asked = {"structured_outputs": StructuredOutputsParams(json=schema)}
        if form is Form.OBJECT_PROBABILITIES:
            asked["logprobs"] = _best_tokens(config)
    elif form is Form.IN_VOCABULARY:
        asked = {"logprob_token_ids": ids}
    else:
        asked = {"allowed_token_ids": ids, "logprobs": len(ids)}
    return SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=extra_args, **asked)


def _best_tokens(config: ArtifactConfig) -> int:
    assert config.objects is not None, "other requests name their labels"
    return best_tokens(field.values for field in config.objects.fields)


def most_tokens(config: ArtifactConfig, max_tokens: int) -> int:
    """The ``max_tokens`` of requests: enough for any choice or object, else those given."""
    if config.choices:
        return longest_choice(config.choices)
    if config.objects is not None:
        return longest_object(config.objects)
    return max_tokens


def longest_choice(choices: Sequence[Choice]) -> int:
    """The most tokens that a request for one of `choices` can generate.

    A model may write a text with more tokens than its tokenizer would, and then the end token.
    """
    return max(len(choice.text.encode()) for choice in choices) + 1


def chosen(outputs: Sequence[RequestOutput], choices: Sequence[Choice]) -> list[list[int]]:
    """For each prompt, the tokens of the chosen text as the tokenizer writes it."""
    tokens = {choice.text: list(choice.token_ids) for choice in choices}
    return [tokens[output.outputs[0].text] for output in outputs]


def class_logprobs(outputs: Sequence[PoolingRequestOutput]) -> Logprobs:
    """The labels' log-probabilities, fp32 [prompts, labels], from a classifier's probabilities."""
    probabilities = np.stack([output.outputs.data.float().numpy() for output in outputs])
    if probabilities.shape[1] == 1:
        probabilities = np.concatenate([1 - probabilities, probabilities], axis=1)
    with np.errstate(divide="ignore"):
        logprobs: Logprobs = np.log(probabilities)
    return logprobs


def value_logprobs(
    outputs: Sequence[RequestOutput], objects: Objects, codes: Sequence[int], tokenizer: Any
) -> Logprobs:
    """Those of the values of objects among those of their fields, see `values_of_answers`."""
    answers = [output.outputs[0].logprobs or [] for output in outputs]
    logprobs: Logprobs = values_of_answers(objects, codes, answers, tokenizer).log().numpy()
    return logprobs


def label_logprobs(outputs: Sequence[RequestOutput], labels: Sequence[Label]) -> Logprobs:
    """The labels' log-probabilities, fp32 [prompts, labels], in the order of `labels`.

    -inf for labels that a request does not name. The requests must have asked for probabilities.
    """
    firsts = [output.outputs[0].logprobs[0] for output in outputs]
    ids = [label.token_id for label in labels]
    rows = [
        [first[token].logprob if token in first else -np.inf for token in ids] for first in firsts
    ]
    return np.array(rows, dtype=np.float32)
