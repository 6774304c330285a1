"""Which policy decides a request: by its adapter, by what it reads, or by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import Adapter, ArtifactConfig
from vllm_adainfer.engine.admission.requested_output import Read, What, choices_served, has_room
from vllm_adainfer.engine.admission.resolved import Resolved
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = get_logger(__name__)


class Policies:
    """The policies of an engine.

    Attributes:
        configs: those of their artifacts, by name.

    """

    def __init__(
        self, settings: Settings, configs: Mapping[str, ArtifactConfig], ends_choices: bool
    ) -> None:
        """See `Admission`."""
        self.configs = configs
        self._settings = settings
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

    def deciding(self, resolved: Resolved, own: Mapping[str, ArtifactConfig]) -> str | None:
        """The policy that decides a request, None if it runs at full depth.

        `own` are the policies for its adapter, or for the base model.
        """
        read, name = resolved.read, resolved.settings.adainfer_policy
        if read is None or not resolved.is_wanted or not resolved.scores_unchanged:
            return None
        if name is None:
            preferred = self._preferred(read, own)
            name = preferred[0] if len(preferred) == 1 else None
        if name is None or name not in own or not self._serves(own[name], resolved, read):
            return None
        return name

    def _serves(self, config: ArtifactConfig, resolved: Resolved, read: Read) -> bool:
        """Whether a policy's bound is about what a request reads, and about as many tokens.

        A bound calibrated on one token covers one token only; on more, the first ones of any
        number.
        """
        if not read.served_by(config):
            return False
        if read.what is What.CHOICE:  # which its first token decides
            return self._ends_choices and has_room(resolved.max_tokens, config)
        return resolved.max_tokens == 1 or config.max_tokens > 1

    def may_come(self, resolved: Resolved, adapter: LoRARequest | None) -> bool:
        """Whether a policy that is loaded with an adapter may decide a request.

        The scheduler, which knows only the policies of the start, takes such a request for one that
        may exit.
        """
        has_points = self._settings.exit_points is not None
        return adapter is not None and has_points and resolved.is_wanted

    def of(
        self, adapter: LoRARequest | None, fingerprint: str | None
    ) -> Mapping[str, ArtifactConfig]:
        """The policies for requests with an adapter; None is the base model.

        `fingerprint` is that of the adapter as vLLM has loaded it.
        """
        named = self.named(adapter)
        if adapter is None:
            return named
        own = {
            name: config
            for name, config in named.items()
            if config.adapter is not None and config.adapter.fingerprint == fingerprint
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

    def named(self, adapter: LoRARequest | None) -> Mapping[str, ArtifactConfig]:
        """The policies that go by an adapter's name, whatever its weights."""
        if adapter is None:
            return self._of_base
        return {
            name: config
            for name, config in self.configs.items()
            if config.adapter is not None and config.adapter.name == adapter.lora_name
        }

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
