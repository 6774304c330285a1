"""The record of a request: written on its arrival, and completed on its admission by a worker.

Nothing that a client sent is parsed anywhere else. The record travels to the workers among the
request's ``extra_args``, and steps read only its fields.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.kinds import NotCovered
from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.promise.label_subsets import ALL, bits_of
from vllm_adainfer.settings.engine import NO_POLICY
from vllm_adainfer.settings.request import RequestSettings, read_request

if TYPE_CHECKING:
    from typing import TypeAlias

    from vllm import PoolingParams, SamplingParams
    from vllm.lora.request import LoRARequest

    Params: TypeAlias = SamplingParams | PoolingParams

ARGUMENT = "_adainfer"  # among a request's extra arguments, which reach the worker
UNLIMITED = 1 << 62
NO_SETTINGS = read_request(None)
NOT_RECORDED = NOT_POOLED = -1


@dataclass
class Running:
    """What is known about a request.

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
        objects: the name of the policy for the object that it asks for; None if there is none.
        guess: the tokens of the object that stands behind its prompt while that is decided, or
            recorded; empty for none.
        guess_rows: of each field, how many rows the one that it is read at lies behind the prompt's
            last.
        kind: the name of its kind, on a server that calibrates itself; None if it never exits.
        pool: the labels of that kind, if it is a label pool; else empty.

    Those from here on are known to the worker, which admits the request:
        prompt: token ids of its prompt.
        adapter: its LoRA adapter; None for the base model.
        weights: the fingerprint of that adapter's weights; None for the base model.
        policy: the name of the policy for its output; `NO_POLICY` if there is none.
        not_covered: why that policy does not serve its prompt; None if it does.
        threshold_row: the row of the thresholds that applies, numbered across policies (with a
            script, the index of the exit point); `FULL_DEPTH` if it may not exit.
        last_token_row: the row of the thresholds if the prompt cannot be pooled as a whole.
        pooled_from: the position from which on its policy pools its prompt; `NOT_POOLED` if it
            reads the last token alone, or if the prompt is not longer.
        subset: the labels to choose among, as bits over the policy's labels; `ALL` for a policy
            without a label pool.
        certified_tokens: how many of its first tokens its policy's bound covers.
        has_choice_policy: whether a policy for choices decides it.
        guessed: how many tokens its guess has, if its policy is for objects or it is recorded; 0
            for others, and -1 if there is none though its policy needs one.
        answers_stand: whether its policy's answers do, see `Promise.answers_stand`.
        text: what its policy's student reads of its prompt, in the student's tokens; empty if it is
            not asked.
        record_row: its line of the calibration data; `NOT_RECORDED` if it has none.

    """

    settings: RequestSettings = NO_SETTINGS
    output: Output | None = None
    max_tokens: int = UNLIMITED
    wants_prompt_logprobs: bool = False
    may_exit: bool = False
    may_end_after_first_token: bool = False
    saving: tuple[str, float] | None = None
    is_shadow: bool = False
    query: str | None = None
    texts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    force_full_depth_prefill: bool = False
    objects: str | None = None
    guess: Sequence[int] = ()
    guess_rows: Sequence[int] = ()
    kind: str | None = None
    pool: Sequence[int] = ()

    prompt: Sequence[int] = ()
    adapter: LoRARequest | None = None
    weights: str | None = None
    policy: str = NO_POLICY
    not_covered: NotCovered | None = None
    threshold_row: int = FULL_DEPTH
    last_token_row: int = FULL_DEPTH
    pooled_from: int = NOT_POOLED
    subset: int = ALL
    certified_tokens: int = UNLIMITED
    has_choice_policy: bool = False
    guessed: int = 0
    answers_stand: bool = False
    text: Sequence[int] = ()
    record_row: int = NOT_RECORDED

    @property
    def reads_values(self) -> bool:
        """Whether it reads how probable the values of its object are."""
        return self.output is not None and self.output.form is Form.OBJECT_PROBABILITIES

    @property
    def of_pool(self) -> int:
        """The labels of `pool` that it names, as bits; `ALL` if there is no pool."""
        if not self.pool or self.output is None:
            return ALL
        return bits_of(self.output.labels or (), self.pool)

    def changed(self, **fields: Any) -> Running:
        """A copy with other `fields`; `dataclasses.replace` would take twice as long."""
        return Running(**{**vars(self), **fields})


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


def attach_resolved(request: Any, resolved: Running) -> None:
    """Let vLLM's `Request` carry `resolved`, in a copy: its parameters may serve other requests."""
    params = copy.copy(params_of(request))
    assert params is not None
    setattr(params, _extra(params), {**extra_arguments(params), ARGUMENT: resolved})
    setattr(request, "pooling_params" if is_for_pooling(params) else "sampling_params", params)


def resolved_of(request: Any) -> Running | None:
    """The record that `attach_resolved` attached; None if no scheduler of ours saw the request."""
    params = params_of(request)
    found = None if params is None else extra_arguments(params).get(ARGUMENT)
    return found if isinstance(found, Running) else None  # a client may send this key, too


def _extra(params: Params) -> str:
    return "extra_kwargs" if is_for_pooling(params) else "extra_args"
