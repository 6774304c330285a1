"""The scheduler's word to the worker that a request's prompt runs at full depth."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import SamplingParams

ARGUMENT = "_adainfer_deep_prompt"  # among a request's extra_args, which reach the worker


def with_deep_prompt(params: SamplingParams) -> SamplingParams:
    """A copy of `params` for which the worker runs the prompt at full depth."""
    params = copy.copy(params)  # the caller's object may serve other requests
    params.extra_args = {**(params.extra_args or {}), ARGUMENT: 1}
    return params


def has_deep_prompt(params: SamplingParams | None) -> bool:
    """Whether `params` came from `with_deep_prompt`."""
    return params is not None and ARGUMENT in (params.extra_args or {})
