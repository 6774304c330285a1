"""What a request reads of its answer: the token alone, or probabilities, and of which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vllm_adainfer.policy.artifact import ArtifactConfig

if TYPE_CHECKING:
    from vllm import SamplingParams


class What(Enum):
    """What is read."""

    TOKEN = "the token alone"
    AMONG_LABELS = "probabilities among the labels"
    IN_VOCABULARY = "probabilities of the labels in the whole vocabulary"


@dataclass(frozen=True)
class Read:
    """What a request reads.

    Attributes:
        what: is read.
        labels: the tokens that it is about; None if any token may be the answer.

    """

    what: What
    labels: frozenset[int] | None

    def served_by(self, config: ArtifactConfig) -> bool:
        """Whether a policy's bound is about this."""
        if not self.is_exactly(config) and not self._is_in_pool(config):
            return False
        if self.what is What.TOKEN:
            return True
        certified = config.risk == "probability"
        return certified and (config.label_mass or self.what is What.AMONG_LABELS)

    def is_exactly(self, config: ArtifactConfig) -> bool:
        """Whether a policy has the same labels."""
        return self.labels == (frozenset(config.label_ids) or None)

    def _is_in_pool(self, config: ArtifactConfig) -> bool:
        """Whether a policy's label pool has these labels, at least two; one has no runner-up."""
        if not config.label_pool or self.labels is None:
            return False
        return len(self.labels) > 1 and self.labels <= set(config.label_ids)


def read_of(params: SamplingParams, logprobs_mode: str) -> Read | None:
    """What a request with `params` reads; None if no policy promises that.

    Log-probabilities of vLLM are over the whole vocabulary, unless the engine was started with
    ``--logprobs-mode processed_logprobs`` and the request allows certain tokens alone
    (``vllm/v1/sample/sampler.py``). In the latter case the best ones are labels; in the former,
    other tokens may be among them, which an early answer does not tell apart.
    """
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
