"""What a request reads of its answer: a token, a choice, or probabilities, and of which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_adainfer.engine.compat_requests import choices_of
from vllm_adainfer.policy.artifact import ArtifactConfig

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


def has_room(params: SamplingParams, config: ArtifactConfig) -> bool:
    """Whether a request may be as long as the longest choice and its end."""
    longest = max(len(choice.token_ids) for choice in config.choices)
    return params.max_tokens is None or params.max_tokens > longest


def read_of(params: SamplingParams, logprobs_mode: str) -> Read | None:
    """What a request with `params` reads; None if no policy promises that.

    Log-probabilities of vLLM are over the whole vocabulary, unless the engine was started with
    ``--logprobs-mode processed_logprobs`` and the request allows certain tokens alone
    (``vllm/v1/sample/sampler.py``). In the latter case the best ones are labels; in the former,
    other tokens may be among them, which an early answer does not tell apart.
    """
    if params.structured_outputs is not None:
        return _choice_read(params)
    allowed = params.allowed_token_ids
    labels = None if allowed is None else frozenset(allowed)
    ids = params.logprob_token_ids
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


KNOWN_SETS = 128  # sets of choices kept, so that a step need not work them out again


def choices_asked(params: SamplingParams) -> frozenset[str] | None:
    """The different texts that a request chooses from; None if it is not restricted to such."""
    structured = params.structured_outputs
    if structured is None:
        return None
    choice = None if structured.choice is None else tuple(structured.choice)
    return _choices(choice, structured.grammar)


@lru_cache(KNOWN_SETS)
def _choices(choice: tuple[str, ...] | None, grammar: str | None) -> frozenset[str] | None:
    found = choices_of(choice, grammar)
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
