"""Request parameters of recordings: a greedy token, or a classifier's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams


def greedy(
    labels: Sequence[int],
    extra_args: dict[str, Any] | None = None,
    max_tokens: int = 1,
    reuse_prefixes: bool = True,
) -> SamplingParams:
    """Parameters for greedy decoding, restricted to `labels`, token ids, if there are any.

    `reuse_prefixes`: whether tokens in vLLM's prefix cache are not run again.
    """
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        allowed_token_ids=list(labels) or None,
        extra_args=extra_args,
        skip_reading_prefix_cache=None if reuse_prefixes else True,
    )


def scores_of(
    extra_kwargs: dict[str, Any] | None = None, reuse_prefixes: bool = True
) -> PoolingParams:
    """Parameters for the probabilities of a classifier; see `greedy`."""
    from vllm import PoolingParams

    return PoolingParams(
        task="classify",
        skip_reading_prefix_cache=not reuse_prefixes,
        extra_kwargs=extra_kwargs,
    )


def best_column(probabilities: Tensor) -> int:
    """The best label of a classifier, by its probabilities, fp32 [columns]."""
    if len(probabilities) == 1:
        return int(probabilities[0] > 0.5)
    return int(probabilities.argmax())
