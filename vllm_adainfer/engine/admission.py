"""Admission: which requests may exit, decided from their sampling parameters and their adapter.

The scheduler (for the prefix cache) and the worker (for the exit loop) ask the same question and
must get the same answer; the frontend refuses requests whose settings the engine cannot serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_adainfer.config import RequestSettings, Settings, read_request
from vllm_adainfer.engine.compat import get_logger, serves_prompt_logprobs
from vllm_adainfer.engine.deep_prompt import has_deep_prompt
from vllm_adainfer.engine.ends_choices import why_choices_go_on
from vllm_adainfer.engine.policies import Policies, request_settings
from vllm_adainfer.engine.reads import Read, What, read_of
from vllm_adainfer.engine.sample import is_sampled
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.artifact import ArtifactConfig
from vllm_adainfer.policy.artifact_files import load_artifact_configs
from vllm_adainfer.policy.label_subsets import ALL, bits_of
from vllm_adainfer.policy.policy_set import first_tags
from vllm_adainfer.policy.questions import KnownQuestions
from vllm_adainfer.policy.script import SCRIPT_LABELS

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

logger = get_logger(__name__)

FULL_DEPTH = -1
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Admitted:
    """What the worker remembers of a request.

    Attributes:
        tag: see `Admission.tag`.
        subset: see `Admission.subset`.
        may_exit: see `Admission.may_exit`.
        is_shadow: see `Admission.is_shadow`.
        prompt: token ids of its prompt.
        max_tokens: most tokens that it may generate.
        chooses: see `Admission.chooses`.
        deep_prompt: whether its prompt runs at full depth, whatever the tag.
        wants_prompt_logprobs: whether it wants log-probabilities of its prompt's tokens.
        params: its sampling parameters.
        adapter: its LoRA adapter; None for the base model. From all three this follows.

    """

    tag: int
    subset: int
    may_exit: bool
    is_shadow: bool
    prompt: Sequence[int]
    max_tokens: int
    chooses: bool
    deep_prompt: bool
    wants_prompt_logprobs: bool
    params: SamplingParams | None
    adapter: LoRARequest | None


class Admission:
    """Gives each request a tag: `FULL_DEPTH`, or a number the policy knows."""

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
                of that name in `compat`.

        Raises:
            AdaInferError: an artifact is missing, or does not certify the switch's epsilon.

        """
        self.records = settings.record is not None
        self._settings = settings
        self._logprobs_mode = logprobs_mode
        self._serves_prompt_logprobs = serves_prompt_logprobs
        if configs is None:
            configs = load_artifact_configs(settings.artifacts)
        self._configs = configs
        self.policies = Policies(settings, configs, logprobs_mode, ends_choices)
        self.has_pools = any(config.label_pool for config in configs.values())
        self.has_choices = any(config.choices for config in configs.values())
        self.may_get_choices = self.has_choices or settings.exit_points is not None
        firsts = first_tags(config.num_tags for config in configs.values())
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
            configs,
            vllm_config.model_config.logprobs_mode,
            why_choices_go_on(vllm_config, settings) is None,
            serves_prompt_logprobs(vllm_config),
        )

    def check(self, params: SamplingParams) -> None:
        """Refuse a request whose settings this engine cannot serve.

        Raises:
            AdaInferError: one is unknown, not valid, or not offered by this engine.

        """
        if params.prompt_logprobs is not None and not self._serves_prompt_logprobs:
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
        name = (None if adapters else self.policies.deciding(request, params, None)) or name
        refused = []
        configs = list(self._configs.values()) if name is None else [self._configs[name]]
        for config in configs:
            try:
                config.level_of(epsilon)
            except AdaInferError as error:
                refused.append(error)
        if refused and (len(refused) == len(configs) or not adapters):
            raise refused[0]

    def admit(
        self,
        request_id: str,
        params: SamplingParams | None,
        prompt: Sequence[int],
        adapter: LoRARequest | None = None,
    ) -> Admitted:
        """What the worker is to remember of a request."""
        return Admitted(
            tag=self.tag(params, prompt, adapter),
            subset=self.subset(params, adapter),
            may_exit=self.may_exit(params, adapter),
            is_shadow=self.is_shadow(request_id),
            prompt=prompt,
            max_tokens=(params and params.max_tokens) or UNLIMITED,
            chooses=self.chooses(params, adapter),
            deep_prompt=has_deep_prompt(params),
            wants_prompt_logprobs=params is not None and params.prompt_logprobs is not None,
            params=params,
            adapter=adapter,
        )

    def may_exit(self, params: SamplingParams | None, adapter: LoRARequest | None = None) -> bool:
        """Whether a request with `params` may leave early, at whatever epsilon.

        Whatever its prompt asks. The answer does not change when other artifacts replace these, see
        `vllm_adainfer.engine.reload.check_replaces`, or come with adapters.
        """
        if params is None or self.records:
            return False
        if self._settings.exit_script is not None:
            return self._scripted(params) != FULL_DEPTH
        request = request_settings(params)
        decided = self.policies.deciding(request, params, adapter) is not None
        if not decided and not self.policies.may_come(request, adapter):
            return False
        epsilon = request.adainfer_epsilon
        return (self._settings.epsilon if epsilon is None else epsilon) != 0

    def prompt_saving(
        self, params: SamplingParams | None, adapter: LoRARequest | None = None
    ) -> tuple[str, float] | None:
        """The policy of a request, and the share of its prompt's layers that exits save for good.

        None if it may not exit, or generates text, where the next token runs what was skipped.
        """
        if params is None or self.records or not self._configs:
            return None
        name = self.policies.deciding(request_settings(params), params, adapter)
        if name is None or self._configs[name].max_tokens > 1:
            return None
        config = self._configs[name]
        return name, config.levels[config.level_of(None)].layers_saved

    def tag(
        self,
        params: SamplingParams | None,
        prompt: Sequence[int] = (),
        adapter: LoRARequest | None = None,
    ) -> int:
        """The policy's number for a request with `params`, or `FULL_DEPTH`.

        With artifacts the number is a row of the thresholds, numbered across policies; while
        recording it is the row of the calibration data; with a script, the index of the exit point.
        """
        if params is None:
            return FULL_DEPTH
        if self.records:
            row = request_settings(params).adainfer_row
            return FULL_DEPTH if row is None else row
        if self._settings.exit_script is not None:
            return self._scripted(params)
        request = request_settings(params)
        name = self.policies.deciding(request, params, adapter)
        if name is None:
            return FULL_DEPTH
        level = self._default_level[name]
        if request.adainfer_epsilon is not None:
            try:
                level = self._configs[name].level_of(request.adainfer_epsilon)
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
        tag = self._configs[name].tag_of(level, question)
        return FULL_DEPTH if tag is None else self._first_tag[name] + tag

    def chooses(self, params: SamplingParams | None, adapter: LoRARequest | None = None) -> bool:
        """Whether a request comes under a policy for choices: its first token alone may exit."""
        if params is None or not self.has_choices:
            return False
        name = self.policies.deciding(request_settings(params), params, adapter)
        return name is not None and bool(self._configs[name].choices)

    def may_choose(self, params: SamplingParams | None, adapter: LoRARequest | None = None) -> bool:
        """The same for the scheduler, which does not know the policies that came with adapters."""
        if params is None:
            return False
        if not self.policies.may_come(request_settings(params), adapter):
            return self.chooses(params, adapter)
        read = read_of(params, self._logprobs_mode)
        return read is not None and read.what is What.CHOICE

    def subset(self, params: SamplingParams | None, adapter: LoRARequest | None = None) -> int:
        """The labels that a request is about, as bits of its policy's; all if it has no pool."""
        if params is None or not self.has_pools:
            return ALL
        name = self.policies.deciding(request_settings(params), params, adapter)
        read = read_of(params, self._logprobs_mode)
        config = None if name is None else self._configs[name]
        if config is None or not config.label_pool or read is None or read.labels is None:
            return ALL
        return bits_of(read.labels, config.label_ids)

    def _scripted(self, params: SamplingParams) -> int:
        """Index of the exit point that a request names, if a label head can answer it."""
        layer = request_settings(params).adainfer_exit
        script = self._settings.exit_script or ()
        if layer is not None and layer not in script:
            logger.warning_once(
                "a request asked for adainfer_exit = %s, which is not an exit point of the script: "
                "it runs at full depth",
                layer,
            )
        read = read_of(params, self._logprobs_mode)
        if layer not in script or read != Read(What.TOKEN, frozenset(SCRIPT_LABELS)):
            return FULL_DEPTH
        covered = self.policies.covers(params, What.TOKEN, UNLIMITED)
        return script.index(layer) if covered else FULL_DEPTH

    def is_shadow(self, request_id: str) -> bool:
        """Whether a request that may exit runs to full depth instead, to be compared."""
        return is_sampled(request_id, self._settings.shadow_rate, "shadow")
