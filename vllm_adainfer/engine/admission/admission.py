"""Admission: which requests may exit, and under which policy, decided on arrival.

In vLLM's frontend, `Admission.check` refuses requests whose settings the engine cannot serve. In
the scheduler, `Admission.resolve` settles everything that follows from what a client sent. Workers
get that record, and add what only they know: the adapters as loaded and the policies in service
(`Admission.admit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.artifact.label_subsets import ALL, bits_of
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.auto.kinds import Kind, kind_names
from vllm_adainfer.engine.admission.admitted import NOT_POOLED, NOT_RECORDED, Admitted
from vllm_adainfer.engine.admission.choice_ends import why_choices_run_on
from vllm_adainfer.engine.admission.kind_of import kind_of_output
from vllm_adainfer.engine.admission.policies import Policies
from vllm_adainfer.engine.admission.requested_output import (
    OutputKind,
    RequestedOutput,
    requested_output,
    requested_scores,
    wants_prompt_logprobs,
)
from vllm_adainfer.engine.admission.resolved import (
    UNLIMITED,
    Resolved,
    extra_arguments,
    is_for_pooling,
)
from vllm_adainfer.engine.admission.threshold_rows import FULL_DEPTH, RowsOfRequest, ThresholdRows
from vllm_adainfer.engine.admission.traffic_sample import GroupSample
from vllm_adainfer.engine.compat.config import serves_prompt_logprobs
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.requests import request_group
from vllm_adainfer.engine.pinned_artifacts import served_configs
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.script import SCRIPT_LABELS
from vllm_adainfer.settings.engine import NO_POLICY, Settings
from vllm_adainfer.settings.request import EXIT_ARG, RequestSettings, read_request

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

    from vllm_adainfer.engine.admission.resolved import Params

logger = get_logger(__name__)

TYPICAL_SAVING = 0.4  # of the layers, by a policy that is still to come; see docs/results.md
OPTED_OUT = RequestSettings.model_validate({EXIT_ARG: 0})
SCRIPTED_OUTPUT = RequestedOutput(OutputKind.TOKEN, frozenset(SCRIPT_LABELS))


class Admission:
    """Decides which requests may exit, and under which policy.

    Attributes:
        policies: the engine's policies.
        is_recording: whether the engine records hidden states for calibration.
        has_pools: whether any policy has a label pool.
        has_choices: whether any policy is for choices.
        has_pooled: whether any policy reads whole prompts, or the engine records them.
        has_students: whether any policy has a student.
        any_stand: whether the answers of any policy stand, see `ArtifactConfig.answers_stand`.
        may_serve_choices: whether any policy is for choices, or one may be loaded with an adapter.

    """

    def __init__(
        self,
        settings: Settings,
        configs: Mapping[str, ArtifactConfig] | None = None,
        logprobs_mode: str = "raw_logprobs",
        ends_choices: bool = True,
        serves_prompt_logprobs: bool = True,
    ) -> None:
        """Prepare to admit requests.

        Args:
            settings: the engine switch.
            configs: the artifacts' configs, by policy name; None loads them.
            logprobs_mode: vLLM's ``--logprobs-mode``.
            ends_choices: whether the scheduler ends a request once one choice is left. Otherwise
                the request's next token would run all the layers that an exit had skipped.
            serves_prompt_logprobs: whether the engine survives requests for log-probabilities of
                the prompt, see the function of that name in `engine/compat/config.py`.

        Raises:
            AdaInferError: an artifact is missing, or does not certify the switch's epsilon.

        """
        if configs is None:
            configs = {n: load_artifact_config(path) for n, path in settings.artifacts.items()}
        self._settings = settings
        self._configs = configs
        self._logprobs_mode = logprobs_mode
        self._serves_prompt_logprobs = serves_prompt_logprobs
        self._ends_choices = ends_choices
        self._promises_order = any(config.top_k is not None for config in configs.values())
        self._draws_groups = self._promises_order or any(
            config.most_together > 1 for config in configs.values()
        )
        self._shadow = GroupSample(settings.shadow_rate, "shadow")
        self.policies = Policies(settings, configs, ends_choices)
        self.is_recording = settings.record is not None
        self.has_pools = any(config.label_pool for config in configs.values())
        self.has_choices = any(config.choices for config in configs.values())
        self.has_pooled = settings.record_pooled_from is not None or any(
            config.is_pooled for config in configs.values()
        )
        self.has_students = any(config.student for config in configs.values())
        self.any_stand = any(config.answers_stand for config in configs.values())
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
        """The admission of an engine; `configs` default to those of its pinned artifacts.

        Raises:
            AdaInferError: see `__init__` and `served_configs`.

        """
        return cls(
            settings,
            served_configs(vllm_config, settings) if configs is None else configs,
            vllm_config.model_config.logprobs_mode,
            why_choices_run_on(vllm_config, settings) is None,
            serves_prompt_logprobs(vllm_config),
        )

    def check(self, params: SamplingParams) -> None:
        """Refuse a request whose settings this engine cannot serve.

        Raises:
            AdaInferError: a setting is unknown, invalid, or not offered by this engine.

        """
        if wants_prompt_logprobs(params) and not self._serves_prompt_logprobs:
            raise AdaInferError(
                "prompt_logprobs (echo with logprobs) ends the engine of vLLM 0.32 on a CPU with "
                "--enable-lora: leave it out, or serve merged weights"
            )
        request = read_request(params.extra_args)
        if request.adainfer_exit is not None and self._settings.exit_script is None:
            raise AdaInferError("adainfer_exit goes with an exit_script, and this engine has none")
        if request.adainfer_row is not None and not self.is_recording:
            raise AdaInferError("adainfer_row is for calibration, and this engine records nothing")
        name = request.adainfer_policy
        if name is not None and name not in self._configs:
            known = ", ".join(self._configs) or "none"
            raise AdaInferError(
                f"adainfer_policy = {name!r:.80} is not a policy of this engine; its policies are: "
                f"{known}"
            )
        if request.adainfer_epsilon is not None:
            if self._settings.calibrates_itself and request.adainfer_epsilon:
                raise AdaInferError(
                    "this server calibrates itself and makes one promise for all: drop "
                    "adainfer_epsilon, or set it to 0 for full depth"
                )
            self._check_epsilon(request.adainfer_epsilon, request, params)

    def _check_epsilon(
        self, epsilon: float, request: RequestSettings, params: SamplingParams
    ) -> None:
        """Refuse an epsilon that the request's policy does not certify.

        Its adapter is unknown here. With adapters, some policy has to certify the epsilon.
        """
        name = request.adainfer_policy
        has_adapters = self.policies.have_adapters or self._settings.exit_points is not None
        if not has_adapters:
            base = self.policies.for_adapter_name(None)
            name = self.policies.select(self._parse(request, params), base) or name
        configs = list(self._configs.values()) if name is None else [self._configs[name]]
        refusals = []
        for config in configs:
            try:
                config.level_of(epsilon)
            except AdaInferError as error:
                refusals.append(error)
        if refusals and (len(refusals) == len(configs) or not has_adapters):
            raise refusals[0]

    def resolve(
        self,
        request_id: str,
        params: Params | None,
        adapter: LoRARequest | None = None,
        resumable: bool = False,
    ) -> Resolved:
        """Settle what follows from what a client sent; see `Resolved`.

        The result stays valid when artifacts are reloaded (see `worker.reload.check_replaces`) or
        come with adapters.

        Args:
            request_id: vLLM's own, which clients cannot choose.
            params: its parameters; None runs at full depth.
            adapter: its LoRA adapter.
            resumable: whether its prompt is still being sent. Later parts attend to earlier ones at
                every layer, so such a request runs at full depth.

        """
        if params is None:
            return Resolved(OPTED_OUT, None, UNLIMITED, wants_prompt_logprobs=False)
        resolved = self._parse(_valid_settings(params), params)
        if resumable:
            return replace(resolved, output=None)
        may_decide = self.policies.may_decide(resolved, adapter)
        kind = self._kind(resolved, adapter)
        if kind is not None:  # it may get a policy at any time
            may_decide = True
        is_choice = resolved.output is not None and resolved.output.kind is OutputKind.CHOICE
        is_shadow = self.is_shadow(request_id)
        return replace(
            resolved,
            may_exit=self._may_exit(resolved, may_decide),
            may_end_after_first_token=may_decide and is_choice,
            saving=self._saving(replace(resolved, kind=kind), adapter),
            is_shadow=is_shadow,
            query=self._query(request_id) if is_shadow else None,
            kind=kind,
        )

    def _query(self, request_id: str) -> str | None:
        """`Resolved.query` of a shadow request."""
        group = request_group(request_id) if self._promises_order else None
        return None if group is None else self._shadow.first_of(request_id, group)

    def _kind(self, resolved: Resolved, adapter: LoRARequest | None) -> str | None:
        """See `Resolved.kind`."""
        if not self._settings.calibrates_itself or resolved.output is None:
            return None
        if resolved.settings.adainfer_epsilon == 0:
            return None  # its client asks for full depth, which earns no budget for others
        kind = kind_of_output(resolved.output, resolved.max_tokens, adapter)
        if kind is not None and kind.choices and not self._ends_choices:
            return None  # it would run on, and no policy covers that
        return None if kind is None or kind.why_full_depth else self._name_of(kind)

    @cached_property
    def _name_of(self) -> Callable[[Kind], str]:
        """Names kinds; the directory exists once the engine is configured."""
        assert self._settings.auto is not None
        return kind_names(AutoDirectory(self._settings.auto.directory).salt)

    def _parse(self, request: RequestSettings, params: Params) -> Resolved:
        """The part of `Resolved` that needs no policy and no adapter."""
        settings, opted_in = self._settings, request.adainfer
        if opted_in is None:
            opted_in = settings.requests != "opt-in"
        output = None
        if is_for_pooling(params):
            output = requested_scores(params) if opted_in else None
            return Resolved(request, output, max_tokens=1, wants_prompt_logprobs=False)
        if opted_in:
            output = requested_output(params, self._logprobs_mode, settings.requests == "all")
        max_tokens = params.max_tokens or UNLIMITED
        return Resolved(request, output, max_tokens, wants_prompt_logprobs(params))

    def is_shadow(self, request_id: str) -> bool:
        """Whether a request that may exit runs to full depth instead, to compare the answers."""
        # What a monitor counts as one is drawn as one: an order's queries, questions of one text.
        group = request_group(request_id) if self._draws_groups else None
        return self._shadow.has(request_id, group)

    def _may_exit(self, resolved: Resolved, may_decide: bool) -> bool:
        """See `Resolved.may_exit`; `may_decide`: whether a policy may decide the request."""
        if self.is_recording:
            return False
        if self._settings.exit_script is not None:
            return self._scripted_row(resolved) != FULL_DEPTH
        epsilon = resolved.settings.adainfer_epsilon
        return may_decide and (self._settings.epsilon if epsilon is None else epsilon) != 0

    def _saving(self, resolved: Resolved, adapter: LoRARequest | None) -> tuple[str, float] | None:
        """See `Resolved.saving`."""
        if resolved.kind is not None:
            return resolved.kind, TYPICAL_SAVING
        name = self.policies.select(resolved, self.policies.for_adapter_name(adapter))
        if name is None or self._configs[name].max_tokens > 1:
            return None
        config = self._configs[name]
        return name, config.levels[config.level_of(None)].layers_saved

    def admit(
        self,
        resolved: Resolved,
        prompt: Sequence[int],
        adapter: LoRARequest | None = None,
        fingerprint: str | None = None,
    ) -> Admitted:
        """Let a request into the worker, under the policies now in service.

        Args:
            resolved: what the scheduler resolved.
            prompt: token ids.
            adapter: its LoRA adapter.
            fingerprint: that of the adapter's weights, as vLLM has loaded them.

        """
        name = self.policies.select(resolved, self.policies.for_adapter(adapter, fingerprint))
        config = None if name is None else self._configs[name]
        record_row = resolved.settings.adainfer_row if self.is_recording else None
        row, last_token_row, not_covered = self._threshold_rows(resolved, name, prompt)
        pooled_from = self._settings.record_pooled_from
        if config is not None:
            pooled_from = config.pooled_from
        if pooled_from is not None and pooled_from >= len(prompt):
            pooled_from, row = None, last_token_row
        return Admitted(
            resolved=resolved,
            threshold_row=row,
            subset=ALL if config is None else _subset(resolved.output, config),
            certified_tokens=UNLIMITED if config is None else config.max_tokens,
            has_choice_policy=config is not None and bool(config.choices),
            answers_stand=config is not None and config.answers_stand,
            pooled_from=NOT_POOLED if pooled_from is None else pooled_from,
            last_token_row=last_token_row,
            text=() if name is None else resolved.texts.get(name, ()),
            prompt=prompt,
            adapter=adapter,
            record_row=NOT_RECORDED if record_row is None else record_row,
            policy=name or NO_POLICY,
            not_covered=not_covered if resolved.may_exit else None,
        )

    def epsilon_of(self, threshold_row: int) -> float | None:
        """The bound that a threshold row keeps; None at full depth."""
        return self._rows.epsilon_of(threshold_row)

    def _threshold_rows(
        self, resolved: Resolved, name: str | None, prompt: Sequence[int]
    ) -> RowsOfRequest:
        """The rows of a request; `name` is its policy."""
        if self._settings.exit_script is not None:
            return RowsOfRequest(self._scripted_row(resolved))
        if name is None:
            return RowsOfRequest()
        epsilon = resolved.settings.adainfer_epsilon
        if epsilon is None:
            epsilon = self._settings.epsilon
        return self._rows.of(name, epsilon, prompt)

    def _scripted_row(self, resolved: Resolved) -> int:
        """Index of the exit point that a request names, if the script's labels can answer it."""
        layer, script = resolved.settings.adainfer_exit, self._settings.exit_script or ()
        if layer is not None and layer not in script:
            logger.warning_once(
                "requests run at full depth where their adainfer_exit is not in the exit_script"
            )
        if layer not in script or resolved.output != SCRIPTED_OUTPUT:
            return FULL_DEPTH
        return script.index(layer)


def _subset(output: RequestedOutput | None, config: ArtifactConfig) -> int:
    """See `Admitted.subset`."""
    if not config.label_pool or output is None or output.labels is None:
        return ALL
    return bits_of(output.labels, config.label_ids)


def _valid_settings(params: Params) -> RequestSettings:
    """A request's settings; `OPTED_OUT` if they are invalid.

    vLLM's frontend refuses such requests by `Admission.check`, but other callers reach the engine.
    """
    try:
        return read_request(extra_arguments(params))
    except AdaInferError:
        logger.warning_once(
            "requests run at full depth whose adainfer arguments are unknown or invalid; vLLM's "
            "server refuses them, and says why"
        )
        return OPTED_OUT
