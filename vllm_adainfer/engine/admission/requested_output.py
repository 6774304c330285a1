"""What a request reads of its answer: a token, a choice, or probabilities, and of which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import MOST_ANSWERS, ArtifactConfig
from vllm_adainfer.engine.compat.structured_outputs import choices_of

if TYPE_CHECKING:
    from vllm import SamplingParams


class What(Enum):
    """What is read."""

    TOKEN = "the token alone"
    CHOICE = "one of several texts"
    AMONG_LABELS = "probabilities among the labels"
    IN_VOCABULARY = "probabilities of the labels in the whole vocabulary"


@dataclass(frozen=True)
class Read:
    """What a request reads.

    Attributes:
        what: is read.
        labels: the tokens that it is about; None if any token may be the answer.
        choices: the texts that it chooses from; None if it is not restricted to such.

    """

    what: What
    labels: frozenset[int] | None
    choices: frozenset[str] | None = None

    def served_by(self, config: ArtifactConfig) -> bool:
        """Whether a policy's bound is about this."""
        if config.choices or self.what is What.CHOICE:
            return self.choices is not None and self.choices == choices_served(config)
        if not self.is_exactly(config) and not self._is_in_pool(config):
            return False
        if self.what is What.TOKEN:
            return True
        certified = config.risk == "probability"
        return certified and (config.label_mass or self.what is What.AMONG_LABELS)

    def is_exactly(self, config: ArtifactConfig) -> bool:
        """Whether a policy has the same labels, or the same choices."""
        if config.choices:
            return self.choices == choices_served(config)
        return self.labels == (frozenset(config.label_ids) or None)

    def _is_in_pool(self, config: ArtifactConfig) -> bool:
        """Whether a policy's label pool has these labels, at least two; one has no runner-up."""
        if not config.label_pool or self.labels is None:
            return False
        return len(self.labels) > 1 and self.labels <= set(config.label_ids)


def choices_served(config: ArtifactConfig) -> frozenset[str] | None:
    """The texts of a policy for choices; None of any other policy."""
    return frozenset(choice.text for choice in config.choices) or None


def has_room(max_tokens: int, config: ArtifactConfig) -> bool:
    """Whether a request for so many tokens may be as long as the longest choice and its end."""
    return max_tokens > max(len(choice.token_ids) for choice in config.choices)


def read_of(params: SamplingParams, logprobs_mode: str) -> Read | None:
    """What a request with `params` reads; None if no policy promises that.

    Called once a request, when it arrives. More than `MOST_ANSWERS` tokens are no policy's labels,
    and are not looked at.

    Log-probabilities of vLLM are over the whole vocabulary, unless the engine was started with
    ``--logprobs-mode processed_logprobs`` and the request allows certain tokens alone
    (``vllm/v1/sample/sampler.py``). In the latter case the best ones are labels; in the former,
    other tokens may be among them, which an early answer does not tell apart.
    """
    if params.structured_outputs is not None:
        return _choice_read(params)
    allowed, ids = params.allowed_token_ids, params.logprob_token_ids
    if max(len(allowed or ()), len(ids or ())) > MOST_ANSWERS:
        return None
    labels = None if allowed is None else frozenset(allowed)
    if params.logprobs is None and ids is None:
        return Read(What.TOKEN, labels)
    processed = logprobs_mode == "processed_logprobs"
    if processed and params.temperature != 0:
        return None  # which changes them
    if processed and labels is not None and (ids is None or labels == frozenset(ids)):
        return Read(What.AMONG_LABELS, labels)
    known = processed or logprobs_mode == "raw_logprobs"
    if known and ids is not None and labels in (None, frozenset(ids)):
        return Read(What.IN_VOCABULARY, frozenset(ids))
    return None


def choices_asked(params: SamplingParams) -> frozenset[str] | None:
    """The different texts that a request chooses from.

    None if it is not restricted to such, or to more text than `choices_of` looks at.
    """
    structured = params.structured_outputs
    if structured is None:
        return None
    found = choices_of(structured.choice, structured.grammar)
    return None if found is None else frozenset(found)


def _choice_read(params: SamplingParams) -> Read | None:
    """A choice, if the choice alone decides what the request gets; else nothing."""
    choices = choices_asked(params)
    return Read(What.CHOICE, None, choices) if choices and is_plain(params) else None


def is_plain(params: SamplingParams) -> bool:
    """Whether a grammar alone decides what a request gets, and it reads no log-probabilities."""
    return (
        params.eos_token_id is not None
        and params.logprobs is None
        and params.logprob_token_ids is None
        and params.allowed_token_ids is None
        and params.repetition_detection is None
        and not params.stop
        and not params.min_tokens
        and not params.logit_bias
        and not params.bad_words
    )


def has_unchanged_scores(params: SamplingParams, read: Read | None, any_temperature: bool) -> bool:
    """Whether what is read comes of the unchanged scores, as the calibrated bound assumes.

    Probabilities in the whole vocabulary are the same at any temperature; ``/generative_scoring``
    leaves it at 1. Penalties of tokens that have come change nothing for a first token.
    """
    what = None if read is None else read.what
    return (
        (params.temperature == 0 or what is What.IN_VOCABULARY or any_temperature)
        and not wants_prompt_logprobs(params)
        and not params.min_tokens
        and not params.logit_bias
        and not params.bad_words
        and (params.structured_outputs is None or what is What.CHOICE)
        and params.thinking_token_budget is None
        and params.trace_decode_token_ids is None
        and params.repetition_penalty == 1
        and (params.max_tokens == 1 or not params.presence_penalty)
        and (params.max_tokens == 1 or not params.frequency_penalty)
    )


def wants_prompt_logprobs(params: SamplingParams) -> bool:
    """Whether a request reads log-probabilities of its prompt's tokens, in either of two ways."""
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
