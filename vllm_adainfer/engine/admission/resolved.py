"""What the scheduler resolves about a request, once, on arrival.

Nothing that a client sent is parsed anywhere else. The record travels to the workers among the
request's ``extra_args``, and steps read only its fields.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_adainfer.engine.admission.requested_output import RequestedOutput
from vllm_adainfer.settings.request import RequestSettings

if TYPE_CHECKING:
    from vllm import SamplingParams

ARGUMENT = "_adainfer"  # among a request's extra_args, which reach the worker
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Resolved:
    """What is known about a request from its arrival on.

    Attributes:
        settings: the request's own settings.
        output: what it wants returned; None if it must run at full depth, because it opted out or
            no policy can promise its output.
        max_tokens: the most tokens that it may generate.
        wants_prompt_logprobs: whether it reads log-probabilities of its prompt's tokens.
        may_exit: whether it may exit at all. True for every request that the worker, which also
            knows the prompt's question and the adapter's weights, lets exit.
        may_end_after_first_token: whether its first token may decide a choice, and so end it.
        saving: name of the policy that probably decides it, and the fraction of its prompt's
            layers that an exit skips for good; None if later steps run the skipped layers.
        is_shadow: whether it runs to full depth where it could exit, to compare the answers.
        texts: policy -> what its student reads of the prompt, in the student's tokens; for the
            policies with a student that may decide the request.
        force_full_depth_prefill: whether its prompt must run at full depth, to complete the blocks
            of a shared prefix.

    """

    settings: RequestSettings
    output: RequestedOutput | None
    max_tokens: int
    wants_prompt_logprobs: bool
    may_exit: bool = False
    may_end_after_first_token: bool = False
    saving: tuple[str, float] | None = None
    is_shadow: bool = False
    texts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    force_full_depth_prefill: bool = False


def with_resolved(params: SamplingParams, resolved: Resolved) -> SamplingParams:
    """A copy of `params` that carries `resolved`; the caller's object may serve other requests."""
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), ARGUMENT: resolved}
    return params


def resolved_of(params: SamplingParams | None) -> Resolved | None:
    """The record that `with_resolved` attached; None if our scheduler has not seen the request."""
    found = None if params is None or params.extra_args is None else params.extra_args.get(ARGUMENT)
    return found if isinstance(found, Resolved) else None  # a client may send this key, too
