"""Admission: which requests may exit, and under which policy.

The scheduler settles what follows from what a client sent, on arrival (`Arrival`). Workers get that
record, and add what only they know: the adapters as loaded and the policies in service.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.artifact.requested import Output
from vllm_adainfer.engine.admission.arrival import Arrival
from vllm_adainfer.engine.admission.policies import Policies, Rows, ThresholdRows
from vllm_adainfer.engine.admission.requested_output import wants_prompt_logprobs
from vllm_adainfer.engine.admission.running import (
    NOT_POOLED,
    NOT_RECORDED,
    UNLIMITED,
    Running,
)
from vllm_adainfer.engine.compat.config import serves_prompt_logprobs
from vllm_adainfer.engine.pinned_artifacts import served_configs
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.promise.label_subsets import ALL, bits_of
from vllm_adainfer.settings.engine import NO_POLICY, Settings
from vllm_adainfer.settings.request import RequestSettings, read_request

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

# Structured outputs backends whose grammars can tell whether they would accept further tokens.
LOOKAHEAD_BACKENDS = ("auto", "xgrammar", "guidance")


class Admission:
    """Lets requests into a worker, each under its policy.

    `may_serve_choices`: whether any policy is for choices, or one may be loaded with an adapter.
    """

    def __init__(
        self,
        settings: Settings,
        configs: Mapping[str, ArtifactConfig] | None = None,
        logprobs_mode: str = "raw_logprobs",
        ends_choices: bool = True,
        serves_prompt_logprobs: bool = True,
    ) -> None:
        """Prepare to admit requests under `configs`; None loads those of the switch.

        `ends_choices`: whether the scheduler ends a request once one choice is left. Otherwise the
        request's next token would run all the layers that an exit had skipped. An AdaInferError if
        an artifact is missing, or does not certify the switch's epsilon.
        """
        if configs is None:
            configs = {n: load_artifact_config(path) for n, path in settings.artifacts.items()}
        self.settings = settings
        self.serves_prompt_logprobs = serves_prompt_logprobs
        self.policies = Policies(settings, configs, ends_choices)
        self.arrival = Arrival(settings, self.policies, logprobs_mode)
        self.is_recording = settings.record is not None
        self.has_pools = any(config.label_pool for config in configs.values())
        self.has_choices = any(config.choices for config in configs.values())
        self.has_objects = bool(settings.record_objects) or any(
            config.objects for config in configs.values()
        )
        self.has_pooled = settings.record_pooled_from is not None or any(
            config.is_pooled for config in configs.values()
        )
        self.has_students = any(config.student for config in configs.values())
        self.any_stand = any(config.promise.answers_stand for config in configs.values())
        self.may_serve_choices = (
            self.has_choices or settings.exit_points is not None or settings.calibrates_itself
        )
        self._rows = ThresholdRows(
            configs, settings.requests == "known", any_prompt=settings.prompts == "any"
        )
        for config in configs.values():
            config.level_of(settings.epsilon)  # which raises what is said above

    @classmethod
    def from_config(
        cls,
        vllm_config: VllmConfig,
        settings: Settings,
        configs: Mapping[str, ArtifactConfig] | None = None,
    ) -> Admission:
        """The admission of an engine; `configs` default to those of its pinned artifacts."""
        return cls(
            settings,
            served_configs(vllm_config, settings) if configs is None else configs,
            vllm_config.model_config.logprobs_mode,
            why_choices_run_on(vllm_config, settings) is None,
            serves_prompt_logprobs(vllm_config),
        )

    def admit(
        self,
        request: Running,
        prompt: Sequence[int],
        adapter: LoRARequest | None = None,
        fingerprint: str | None = None,
    ) -> Running:
        """Let a request into the worker, under the policies now in service.

        `fingerprint` is that of its adapter's weights, as vLLM has loaded them.
        """
        name = self.policies.select(request, self.policies.for_adapter(adapter, fingerprint))
        config = None if name is None else self.policies.configs[name]
        record_row = request.settings.adainfer_row if self.is_recording else None
        row, last_token_row, not_covered = self._rows_of(request, name, prompt)
        pooled_from = self.settings.record_pooled_from
        if config is not None:
            pooled_from = config.pooled_from
        if pooled_from is not None and pooled_from >= len(prompt):
            row, pooled_from = last_token_row, None
        return request.changed(
            prompt=prompt,
            adapter=adapter,
            weights=fingerprint,
            policy=name or NO_POLICY,
            not_covered=not_covered if request.may_exit else None,
            threshold_row=row,
            last_token_row=last_token_row,
            pooled_from=NOT_POOLED if pooled_from is None else pooled_from,
            subset=ALL if config is None else _subset(request.output, config),
            certified_tokens=UNLIMITED if config is None else config.max_tokens,
            has_choice_policy=config is not None and bool(config.choices),
            guessed=_guessed(request, config),
            answers_stand=config is not None and config.promise.answers_stand,
            text=() if name is None else request.texts.get(name, ()),
            record_row=NOT_RECORDED if record_row is None else record_row,
        )

    def epsilon_of(self, threshold_row: int) -> float | None:
        """The bound that a threshold row keeps; None at full depth."""
        return self._rows.epsilon_of(threshold_row)

    def _rows_of(self, request: Running, policy: str | None, prompt: Sequence[int]) -> Rows:
        if self.settings.exit_script is not None:
            return request.threshold_row, FULL_DEPTH, None
        if policy is None:
            return FULL_DEPTH, FULL_DEPTH, None
        epsilon = request.settings.adainfer_epsilon
        return self._rows.of(policy, self.settings.epsilon if epsilon is None else epsilon, prompt)


def _subset(output: Output | None, config: ArtifactConfig) -> int:
    """See `Running.subset`."""
    if not config.label_pool or output is None or output.labels is None:
        return ALL
    return bits_of(output.labels, config.label_ids)


def _guessed(request: Running, config: ArtifactConfig | None) -> int:
    """See `Running.guessed`."""
    if config is not None and config.objects is not None:
        return len(request.guess) or -1
    return len(request.settings.adainfer_guess or ())


def why_choices_run_on(vllm_config: VllmConfig, settings: Settings) -> str | None:
    """Why vLLM samples a choice to its last token; None if requests end once one choice is left."""
    if not settings.finishes_choices:
        return '"finish_choices" is off'
    grammars = vllm_config.structured_outputs_config
    if grammars.reasoning_parser:
        return "the grammar of a server with a reasoning parser begins after the reasoning"
    if grammars.backend not in LOOKAHEAD_BACKENDS:
        return f"the structured outputs backend {grammars.backend} cannot look ahead"
    if vllm_config.model_config.return_sampling_mask:
        return "sampling masks are returned, and the tokens appended would have none"
    return None


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
    if request.adainfer_guess is not None and not settings.record_objects:
        raise AdaInferError("adainfer_guess is for calibration, and this engine records nothing")
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
