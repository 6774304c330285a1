"""Admission: which requests may exit, decided when they arrive.

The frontend refuses requests whose settings the engine cannot serve (`check`). The scheduler
decides all that follows from what a client sent (`resolve`), and what it decided goes to the
workers, which add what they alone know: the adapters as loaded, and the policies of the moment
(`admit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.artifact.label_subsets import ALL, bits_of
from vllm_adainfer.engine.admission.choice_endings import why_choices_go_on
from vllm_adainfer.engine.admission.policies import Policies
from vllm_adainfer.engine.admission.requested_output import (
    Read,
    What,
    has_unchanged_scores,
    read_of,
    wants_prompt_logprobs,
)
from vllm_adainfer.engine.admission.resolved import UNLIMITED, Resolved
from vllm_adainfer.engine.admission.traffic_sample import is_sampled
from vllm_adainfer.engine.compat.config import serves_prompt_logprobs
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.pinned_artifacts import served_configs
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.policy_set import first_tags
from vllm_adainfer.policy.questions import KnownQuestions
from vllm_adainfer.policy.script import SCRIPT_LABELS
from vllm_adainfer.settings.engine import Settings
from vllm_adainfer.settings.request import EXIT_ARG, RequestSettings, read_request

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

logger = get_logger(__name__)

FULL_DEPTH = -1
NOT_UNDERSTOOD = RequestSettings.model_validate({EXIT_ARG: 0})
SCRIPTED = Read(What.TOKEN, frozenset(SCRIPT_LABELS))


@dataclass(frozen=True)
class Admitted:
    """What the worker remembers of a request.

    Attributes:
        resolved: what was decided when it arrived.
        tag: `FULL_DEPTH`, or a number the policies know: with artifacts a row of the thresholds,
            numbered across policies; while recording the row of the calibration data; with a
            script, the index of the exit point.
        subset: the labels that it is about, as bits of its policy's; all if it has no pool.
        certified_tokens: so many tokens, the first ones, may exit: as many as its policy's bound is
            about.
        chooses: whether it comes under a policy for choices.
        prompt: token ids of its prompt.
        prompt_len: how many these are.
        adapter: its LoRA adapter; None for the base model.

    """

    resolved: Resolved
    tag: int
    subset: int
    certified_tokens: int
    chooses: bool
    prompt: Sequence[int]
    prompt_len: int
    adapter: LoRARequest | None


class Admission:
    """Decides which requests may exit, and by which policy.

    Attributes:
        policies: of the engine.
        records: whether it runs for calibration.
        has_pools: whether a policy has a label pool.
        has_choices: whether a policy is for choices.
        may_get_choices: the same, and whether such a policy may come with an adapter.

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
            settings: of the engine switch.
            configs: those of the artifacts, by policy; None reads them.
            logprobs_mode: of the engine: what it returns as log-probabilities.
            ends_choices: whether the scheduler ends a request once one choice is left. Where it
                does not, the next token would run all that an exit had skipped.
            serves_prompt_logprobs: whether the engine survives requests for them, see the function
                of that name in `engine/compat/config.py`.

        Raises:
            AdaInferError: an artifact is missing, or does not certify the switch's epsilon.

        """
        self.records = settings.record is not None
        self._settings = settings
        self._logprobs_mode = logprobs_mode
        self._serves_prompt_logprobs = serves_prompt_logprobs
        if configs is None:
            configs = {n: load_artifact_config(path) for n, path in settings.artifacts.items()}
        self._configs = configs
        self.policies = Policies(settings, configs, ends_choices)
        self.has_pools = any(config.label_pool for config in configs.values())
        self.has_choices = any(config.choices for config in configs.values())
        self.may_get_choices = self.has_choices or settings.exit_points is not None
        firsts = first_tags(config.num_threshold_rows for config in configs.values())
        self._first_tag = dict(zip(configs, firsts, strict=True))
        self._default_level = {
            name: config.level_of(settings.epsilon) for name, config in configs.items()
        }
        self._known = {
            name: KnownQuestions(question.ends for question in config.questions)
            for name, config in configs.items()
            if config.by_question or settings.requests == "known"
        }

    @classmethod
    def of(
        cls,
        vllm_config: VllmConfig,
        settings: Settings,
        configs: Mapping[str, ArtifactConfig] | None = None,
    ) -> Admission:
        """That of an engine."""
        return cls(
            settings,
            served_configs(vllm_config, settings) if configs is None else configs,
            vllm_config.model_config.logprobs_mode,
            why_choices_go_on(vllm_config, settings) is None,
            serves_prompt_logprobs(vllm_config),
        )

    def check(self, params: SamplingParams) -> None:
        """Refuse a request whose settings this engine cannot serve.

        Raises:
            AdaInferError: one is unknown, not valid, or not offered by this engine.

        """
        if wants_prompt_logprobs(params) and not self._serves_prompt_logprobs:
            raise AdaInferError(
                "prompt_logprobs (echo with logprobs) ends the engine of vLLM 0.32 on a CPU with "
                "--enable-lora: leave it out, or serve merged weights"
            )
        request = read_request(params.extra_args)
        if request.adainfer_exit is not None and self._settings.exit_script is None:
            raise AdaInferError("adainfer_exit goes with an exit_script, and this engine has none")
        if request.adainfer_row is not None and not self.records:
            raise AdaInferError("adainfer_row is for calibration, and this engine records nothing")
        name = request.adainfer_policy
        if name is not None and name not in self._configs:
            known = ", ".join(self._configs) or "none"
            raise AdaInferError(
                f"adainfer_policy = {name!r:.80} is not a policy of this engine; its policies are: "
                f"{known}"
            )
        if request.adainfer_epsilon is not None:
            self._check_epsilon(request.adainfer_epsilon, name, request, params)

    def _check_epsilon(
        self, epsilon: float, name: str | None, request: RequestSettings, params: SamplingParams
    ) -> None:
        """Refuse what no policy promises that may decide the request; its adapter is not known."""
        adapters = self.policies.have_adapters or self._settings.exit_points is not None
        if not adapters:
            resolved = self._understood(request, params)
            name = self.policies.deciding(resolved, self.policies.named(None)) or name
        refused = []
        configs = list(self._configs.values()) if name is None else [self._configs[name]]
        for config in configs:
            try:
                config.level_of(epsilon)
            except AdaInferError as error:
                refused.append(error)
        if refused and (len(refused) == len(configs) or not adapters):
            raise refused[0]

    def resolve(
        self,
        request_id: str,
        params: SamplingParams | None,
        adapter: LoRARequest | None = None,
        resumable: bool = False,
    ) -> Resolved:
        """Decide about a request that has arrived.

        Args:
            request_id: vLLM's own, which clients cannot choose.
            params: its sampling parameters.
            adapter: its LoRA adapter.
            resumable: whether its prompt is still being sent. Later parts attend to earlier ones at
                every layer, so such a request runs at full depth.

        """
        if params is None:
            return NOTHING
        resolved = self._understood(request_settings(params), params)
        if resumable:
            return replace(resolved, read=None, is_wanted=False)
        return replace(
            resolved,
            may_exit=self._may_exit(resolved, adapter),
            may_choose=self._may_choose(resolved, adapter),
            saving=self._saving(resolved, adapter),
            is_shadow=self.is_shadow(request_id),
        )

    def _understood(self, request: RequestSettings, params: SamplingParams) -> Resolved:
        """What the settings of a request and its sampling parameters say."""
        settings = self._settings
        read = read_of(params, self._logprobs_mode)
        wanted = request.adainfer
        return Resolved(
            settings=request,
            read=read,
            is_wanted=settings.requests != "opt-in" if wanted is None else wanted,
            scores_unchanged=has_unchanged_scores(params, read, settings.requests == "all"),
            max_tokens=params.max_tokens or UNLIMITED,
            wants_prompt_logprobs=wants_prompt_logprobs(params),
        )

    def is_shadow(self, request_id: str) -> bool:
        """Whether a request that may exit runs to full depth instead, to be compared."""
        return is_sampled(request_id, self._settings.shadow_rate, "shadow")

    def _may_exit(self, resolved: Resolved, adapter: LoRARequest | None) -> bool:
        """See `Resolved.may_exit`.

        The answer does not change when artifacts are reloaded (see `worker.reload.check_replaces`)
        or come with adapters. The files of an adapter are not read here, so a policy that goes by
        its name counts, whatever its weights.
        """
        if self.records:
            return False
        if self._settings.exit_script is not None:
            return self._scripted(resolved) != FULL_DEPTH
        own = self.policies.named(adapter)
        if adapter is None:
            decided = self.policies.deciding(resolved, own) is not None
        else:  # one alone may have the adapter's weights
            alone = ({name: config} for name, config in own.items())
            decided = any(self.policies.deciding(resolved, one) is not None for one in alone)
        if not decided and not self.policies.may_come(resolved, adapter):
            return False
        epsilon = resolved.settings.adainfer_epsilon
        return (self._settings.epsilon if epsilon is None else epsilon) != 0

    def _saving(self, resolved: Resolved, adapter: LoRARequest | None) -> tuple[str, float] | None:
        """See `Resolved.saving`."""
        name = self.policies.deciding(resolved, self.policies.named(adapter))
        if name is None or self._configs[name].max_tokens > 1:
            return None
        config = self._configs[name]
        return name, config.levels[config.level_of(None)].layers_saved

    def _may_choose(self, resolved: Resolved, adapter: LoRARequest | None) -> bool:
        """See `Resolved.may_choose`."""
        read = resolved.read
        if read is None or read.what is not What.CHOICE:
            return False
        if self.policies.may_come(resolved, adapter):
            return True
        return self.policies.deciding(resolved, self.policies.named(adapter)) is not None

    def admit(
        self,
        resolved: Resolved,
        prompt: Sequence[int],
        adapter: LoRARequest | None = None,
        fingerprint: str | None = None,
    ) -> Admitted:
        """What the worker is to remember of a request.

        Args:
            resolved: what the scheduler decided.
            prompt: token ids.
            adapter: its LoRA adapter.
            fingerprint: that of the adapter, as vLLM has loaded it.

        """
        name = self.policies.deciding(resolved, self.policies.of(adapter, fingerprint))
        config = None if name is None else self._configs[name]
        chooses = config is not None and bool(config.choices)
        return Admitted(
            resolved=resolved,
            tag=self._tag(resolved, name, prompt),
            subset=ALL if config is None else _subset(resolved.read, config),
            certified_tokens=UNLIMITED if config is None else config.max_tokens,
            chooses=chooses,
            prompt=prompt,
            prompt_len=len(prompt),
            adapter=adapter,
        )

    def _tag(self, resolved: Resolved, name: str | None, prompt: Sequence[int]) -> int:
        """See `Admitted.tag`; `name` is the request's policy."""
        if self.records:
            row = resolved.settings.adainfer_row
            return FULL_DEPTH if row is None else row
        if self._settings.exit_script is not None:
            return self._scripted(resolved)
        if name is None:
            return FULL_DEPTH
        level = self._default_level[name]
        if resolved.settings.adainfer_epsilon is not None:
            try:
                level = self._configs[name].level_of(resolved.settings.adainfer_epsilon)
            except AdaInferError as error:
                logger.warning_once("a request runs at full depth: %s", str(error))
                return FULL_DEPTH
        if level < 0:
            return FULL_DEPTH
        question = None
        if name in self._known:
            question = self._known[name].asked_by(prompt)
            if question is None:
                return FULL_DEPTH
        tag = self._configs[name].threshold_row(level, question)
        return FULL_DEPTH if tag is None else self._first_tag[name] + tag

    def _scripted(self, resolved: Resolved) -> int:
        """Index of the exit point that a request names, if a label head can answer it."""
        layer = resolved.settings.adainfer_exit
        script = self._settings.exit_script or ()
        if layer is not None and layer not in script:
            logger.warning_once(
                "a request asked for adainfer_exit = %s, which is not an exit point of the script: "
                "it runs at full depth",
                layer,
            )
        if layer not in script or resolved.read != SCRIPTED:
            return FULL_DEPTH
        return script.index(layer) if resolved.scores_unchanged else FULL_DEPTH


def _subset(read: Read | None, config: ArtifactConfig) -> int:
    """The labels that a request is about, as bits of its policy's."""
    if not config.label_pool or read is None or read.labels is None:
        return ALL
    return bits_of(read.labels, config.label_ids)


def request_settings(params: SamplingParams) -> RequestSettings:
    """A request's settings; full depth if they are not valid.

    vLLM's frontend refuses such a request by `Admission.check`; others can reach the engine.
    """
    try:
        return read_request(params.extra_args)
    except AdaInferError as error:
        logger.warning_once("a request runs at full depth: %s", str(error))
        return NOT_UNDERSTOOD


NOTHING = Resolved(
    settings=NOT_UNDERSTOOD,
    read=None,
    is_wanted=False,
    scores_unchanged=False,
    max_tokens=UNLIMITED,
    wants_prompt_logprobs=False,
)  # of a request without sampling parameters
