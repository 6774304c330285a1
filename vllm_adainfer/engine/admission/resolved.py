"""What is decided about a request when it arrives: once, by the scheduler, for all that follow.

Whatever a client sent is looked at here and nowhere else. The record travels to the workers among
the request's ``extra_args``; a step reads its fields and never the client's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_adainfer.engine.admission.requested_output import Read
from vllm_adainfer.settings.request import RequestSettings

if TYPE_CHECKING:
    from vllm import SamplingParams

ARGUMENT = "_adainfer"  # among a request's extra_args, which reach the worker
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Resolved:
    """What was decided about a request when it arrived.

    Attributes:
        settings: the request's own settings.
        read: what it reads; None if no policy promises that.
        is_wanted: whether it is to exit where it can.
        scores_unchanged: whether what it reads comes of the model's unchanged scores, as every
            calibrated bound assumes.
        max_tokens: the most tokens that it may generate.
        wants_prompt_logprobs: whether it reads log-probabilities of its prompt's tokens.
        may_exit: whether it may leave early at all, whatever its prompt asks and whatever files
            its adapter has: no less than what the worker lets exit.
        may_choose: whether its first token may be its last, as that of a choice.
        saving: the policy that it probably comes under, and the share of its prompt's layers that
            exits save for good; None if later steps run what was skipped.
        is_shadow: whether it runs to full depth, to be compared, where it could exit.
        deep_prompt: whether its prompt runs at full depth.

    """

    settings: RequestSettings
    read: Read | None
    is_wanted: bool
    scores_unchanged: bool
    max_tokens: int
    wants_prompt_logprobs: bool
    may_exit: bool = False
    may_choose: bool = False
    saving: tuple[str, float] | None = None
    is_shadow: bool = False
    deep_prompt: bool = False


def with_resolved(params: SamplingParams, resolved: Resolved) -> SamplingParams:
    """A copy of `params` that carries `resolved`; the caller's object may serve other requests."""
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), ARGUMENT: resolved}
    return params


def resolved_of(params: SamplingParams | None) -> Resolved | None:
    """What `with_resolved` has put there; None if no scheduler of ours has seen the request."""
    found = None if params is None or params.extra_args is None else params.extra_args.get(ARGUMENT)
    return found if isinstance(found, Resolved) else None  # a client may send this key, too
