"""The kind of a one-answer request, from what the client sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.engine.admission.requested_output import requested_output
from vllm_adainfer.engine.admission.running import is_for_pooling
from vllm_adainfer.promise.output import Form, Output

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_adainfer.engine.admission.running import Params


def kind_of(
    params: Params | None, adapter: LoRARequest | None, resumable: bool, logprobs_mode: str
) -> Kind | None:
    """The kind of a request; None unless it reads one answer of a fixed set.

    Called once per request, on arrival. The time is linear, and limited as in `requested_output`.
    Probabilities in the whole vocabulary count at any temperature, which does not change them;
    anything else only if it is greedy. `resumable`: whether its prompt is still being sent.
    """
    if params is None or resumable or is_for_pooling(params):
        return None
    output = requested_output(params, logprobs_mode)
    return None if output is None else kind_of_output(output, params.max_tokens, adapter)


def kind_of_output(
    output: Output, max_tokens: int | None, adapter: LoRARequest | None
) -> Kind | None:
    """The kind of a request with such an output; None unless it is one answer of a fixed set."""
    if not output.is_greedy and output.form is not Form.IN_VOCABULARY:
        return None
    name = None if adapter is None else adapter.lora_name
    if output.form is Form.CHOICE:
        return Kind("choice", choices=tuple(sorted(output.choices or ())), adapter=name)
    if not output.labels or max_tokens != 1:
        return None
    labels = tuple(sorted(output.labels))
    return Kind("label" if output.form is Form.TOKEN else "probabilities", labels, (), name)
