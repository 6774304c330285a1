"""Which policy decides a request: by its adapter, by what it reads, or by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_adainfer.config import EXIT_ARG, RequestSettings, Settings, read_request
from vllm_adainfer.engine.adapters import fingerprint_of
from vllm_adainfer.engine.compat import get_logger
from vllm_adainfer.engine.reads import Read, What, choices_served, has_room, read_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.artifact import Adapter, ArtifactConfig

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

logger = get_logger(__name__)

NOT_UNDERSTOOD = RequestSettings.model_validate({EXIT_ARG: 0})


class Policies:
    """The policies of an engine.

    Attributes:
        configs: those of their artifacts, by name.

    """

    def __init__(
        self,
        settings: Settings,
        configs: Mapping[str, ArtifactConfig],
        logprobs_mode: str,
        ends_choices: bool,
    ) -> None:
        """See `Admission`."""
        self.configs = configs
        self._settings = settings
        self._logprobs_mode = logprobs_mode
        self._ends_choices = ends_choices
        self.have_adapters = any(config.adapter for config in configs.values())
        self._of_base = {name: one for name, one in configs.items() if one.adapter is None}

    @property
    def ambiguous(self) -> list[list[str]]:
        """Policies of which a request has to name one."""
        adapters = {config.adapter for config in self.configs.values()}
        groups = {group for adapter in adapters for group in self._ambiguous_for(adapter)}
        return [list(names) for names in sorted(groups) if len(names) > 1]

    def _ambiguous_for(self, adapter: Adapter | None) -> set[tuple[str, ...]]:
        """The policies that may serve a request with `adapter`, for all that it may read."""
        own = {name: config for name, config in self.configs.items() if config.adapter == adapter}
        plain = [config for config in own.values() if not config.choices]
        sets = {frozenset(config.label_ids) or None for config in plain}
        # Pools may share labels that none of them has exactly.
        shared = {one & other for one in sets for other in sets if one and other}
        sets |= shared | {both - {label} for both in shared for label in both}
        reads = [Read(what, labels) for labels in sets for what in What]
        texts = {choices_served(config) for config in own.values()} - {None}
        reads += [Read(What.CHOICE, None, choices) for choices in texts]
        return {tuple(self._preferred(read, own)) for read in reads}

    def deciding(
        self, request: RequestSettings, params: SamplingParams, adapter: LoRARequest | None
    ) -> str | None:
        """The policy that may decide a request, None if it runs at full depth."""
        if not self._is_wanted(request):
            return None
        read = read_of(params, self._logprobs_mode)
        if read is None:
            return None
        name = request.adainfer_policy
        own = self._of_adapter(adapter)
        preferred = self._preferred(read, own)
        if name is None and len(preferred) == 1:
            [name] = preferred
        config = None if name is None else own.get(name)
        if config is None or not read.served_by(config):
            return None
        if read.what is What.CHOICE and not (self._ends_choices and has_room(params, config)):
            return None
        return name if self.covers(params, read.what, config.max_tokens) else None

    def may_come(self, request: RequestSettings, adapter: LoRARequest | None) -> bool:
        """Whether a policy that was loaded with an adapter may decide a request.

        The scheduler, which knows only the policies of the start, takes such a request for one that
        may exit.
        """
        if adapter is None or self._settings.exit_points is None:
            return False
        return self._is_wanted(request)

    def _is_wanted(self, request: RequestSettings) -> bool:
        """Whether a request is to exit where it can."""
        wanted = request.adainfer
        return self._settings.requests != "opt-in" if wanted is None else wanted

    def _of_adapter(self, adapter: LoRARequest | None) -> Mapping[str, ArtifactConfig]:
        """The policies for requests with an adapter; None is the base model."""
        if adapter is None:
            return self._of_base
        if not self.have_adapters:
            return {}
        named = {
            name: config
            for name, config in self.configs.items()
            if config.adapter is not None and config.adapter.name == adapter.lora_name
        }
        found = fingerprint_of(adapter.lora_path) if named else None
        own = {
            name: config
            for name, config in named.items()
            if config.adapter is not None and config.adapter.fingerprint == found
        }
        for name in named.keys() - own:
            logger.warning_once(
                "requests with the adapter %s run at full depth: policy %s was calibrated for "
                "another adapter of this name: calibrate with --lora %s=%s",
                adapter.lora_name,
                name,
                adapter.lora_name,
                adapter.lora_path,
            )
        return own

    def _preferred(self, read: Read, among: Mapping[str, ArtifactConfig]) -> list[str]:
        """The policies that may serve what a request reads, if it names none.

        Those whose labels are exactly the request's go before those with a pool of more, and then
        those that promise the token alone, where that is enough: they save more.
        """
        configs = {name: config for name, config in among.items() if read.served_by(config)}
        exact = [name for name, config in configs.items() if read.is_exactly(config)]
        names = exact or list(configs)
        tokens = [name for name in names if configs[name].risk != "probability"]
        return tokens or names

    def covers(self, params: SamplingParams, what: What, max_tokens: int) -> bool:
        """Whether what is read comes of the unchanged scores, as the calibrated bound assumes.

        A bound calibrated on one token covers one token only; on more, any number. Probabilities in
        the whole vocabulary are the same at any temperature; ``/generative_scoring`` leaves it at
        1.
        """
        greedy = params.temperature == 0 or what is What.IN_VOCABULARY
        is_choice = what is What.CHOICE  # which its first token decides
        return (
            (params.max_tokens == 1 or max_tokens > 1 or is_choice)
            and (greedy or self._settings.requests == "all")
            and params.prompt_logprobs is None
            and not params.min_tokens
            and not params.logit_bias
            and not params.bad_words
            and (params.structured_outputs is None or is_choice)
            and params.thinking_token_budget is None
            and params.repetition_penalty == 1
            and (params.max_tokens == 1 or not params.presence_penalty)
            and (params.max_tokens == 1 or not params.frequency_penalty)
        )


def request_settings(params: SamplingParams) -> RequestSettings:
    """A request's settings; full depth if they are not valid.

    vLLM's frontend refuses such a request by `Admission.check`; others can reach the engine.
    """
    try:
        return read_request(params.extra_args)
    except AdaInferError as error:
        logger.warning_once("a request runs at full depth: %s", str(error))
        return NOT_UNDERSTOOD
