"""Refusals in vLLM's frontend: settings of a request that the engine cannot serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.requested_output import wants_prompt_logprobs
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.request import RequestSettings, read_request

if TYPE_CHECKING:
    from vllm import SamplingParams


def check_request(params: SamplingParams, admission: Admission) -> None:
    """Raise an AdaInferError that says which setting the engine of `admission` cannot serve."""
    settings, configs = admission.settings, admission.policies.configs
    if wants_prompt_logprobs(params) and not admission.serves_prompt_logprobs:
        raise AdaInferError(
            "prompt_logprobs (echo with logprobs) ends the engine of vLLM 0.32 on a CPU with "
            "--enable-lora: leave it out, or serve merged weights"
        )
    request = read_request(params.extra_args)
    if request.adainfer_exit is not None and settings.exit_script is None:
        raise AdaInferError("adainfer_exit goes with an exit_script, and this engine has none")
    if request.adainfer_row is not None and settings.record is None:
        raise AdaInferError("adainfer_row is for calibration, and this engine records nothing")
    name = request.adainfer_policy
    if name is not None and name not in configs:
        known = ", ".join(configs) or "none"
        raise AdaInferError(
            f"adainfer_policy = {name!r:.80} is not a policy of this engine; its policies are: "
            f"{known}"
        )
    if request.adainfer_epsilon is not None:
        if settings.calibrates_itself and request.adainfer_epsilon:
            raise AdaInferError(
                "this server calibrates itself and makes one promise for all: drop "
                "adainfer_epsilon, or set it to 0 for full depth"
            )
        _check_epsilon(request.adainfer_epsilon, request, params, admission)


def _check_epsilon(
    epsilon: float, request: RequestSettings, params: SamplingParams, admission: Admission
) -> None:
    """Refuse an epsilon that the request's policy does not certify.

    Its adapter is unknown here. With adapters, some policy has to certify the epsilon.
    """
    name, policies = request.adainfer_policy, admission.policies
    has_adapters = policies.have_adapters or admission.settings.exit_points is not None
    if not has_adapters:
        base = policies.for_adapter_name(None)
        name = policies.select(admission.arrival.parse(request, params), base) or name
    configs = list(policies.configs.values()) if name is None else [policies.configs[name]]
    refusals = []
    for config in configs:
        try:
            config.level_of(epsilon)
        except AdaInferError as error:
            refusals.append(error)
    if refusals and (len(refusals) == len(configs) or not has_adapters):
        raise refusals[0]
