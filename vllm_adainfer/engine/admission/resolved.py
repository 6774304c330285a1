"""What the scheduler resolves about a request, once, on arrival.

Nothing that a client sent is parsed anywhere else. The record travels to the workers among the
request's ``extra_args``, and steps read only its fields.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_adainfer.engine.admission.requested_output import RequestedOutput
from vllm_adainfer.settings.request import RequestSettings

if TYPE_CHECKING:
    from typing import TypeAlias

    from vllm import PoolingParams, SamplingParams

    Params: TypeAlias = SamplingParams | PoolingParams

ARGUMENT = "_adainfer"  # among a request's extra arguments, which reach the worker
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
        query: of a document whose query is compared as a whole, the request of the first document;
            None for all other requests.
        texts: policy -> what its student reads of the prompt, in the student's tokens; for the
            policies with a student that may decide the request.
        force_full_depth_prefill: whether its prompt must run at full depth, to complete the blocks
            of a shared prefix.
        kind: the name of its kind, on a server that calibrates itself; None if it never exits.

    """

    settings: RequestSettings
    output: RequestedOutput | None
    max_tokens: int
    wants_prompt_logprobs: bool
    may_exit: bool = False
    may_end_after_first_token: bool = False
    saving: tuple[str, float] | None = None
    is_shadow: bool = False
    query: str | None = None
    texts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    force_full_depth_prefill: bool = False
    kind: str | None = None


def params_of(request: Any) -> Params | None:
    """The parameters of vLLM's `Request` or `NewRequestData`, for sampling or for pooling."""
    params: Params | None = request.sampling_params or request.pooling_params
    return params


def is_for_pooling(params: Params) -> bool:
    """Whether a classifier gets the request, which vLLM runs as a pooling model."""
    return hasattr(params, "extra_kwargs")


def extra_arguments(params: Params) -> Mapping[str, Any]:
    """What a client sends beside vLLM's own parameters."""
    return getattr(params, _extra(params)) or {}


def attach_resolved(request: Any, resolved: Resolved) -> None:
    """Let vLLM's `Request` carry `resolved`, in a copy: its parameters may serve other requests."""
    params = copy.copy(params_of(request))
    assert params is not None
    setattr(params, _extra(params), {**extra_arguments(params), ARGUMENT: resolved})
    setattr(request, "pooling_params" if is_for_pooling(params) else "sampling_params", params)


def resolved_of(request: Any) -> Resolved | None:
    """The record that `attach_resolved` attached; None if no scheduler of ours saw the request."""
    params = params_of(request)
    found = None if params is None else extra_arguments(params).get(ARGUMENT)
    return found if isinstance(found, Resolved) else None  # a client may send this key, too


def _extra(params: Params) -> str:
    return "extra_kwargs" if is_for_pooling(params) else "extra_args"
