"""Selects a request's policy, by its adapter, output or name; and the row of its thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from vllm_adainfer.artifact.artifact import all_parts
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Adapter
from vllm_adainfer.artifact.kinds import NotCovered
from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.engine.admission.running import Running
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.policy.policy_set import first_threshold_rows
from vllm_adainfer.policy.questions import asked_among
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = get_logger(__name__)

# `threshold_row`, `last_token_row` and `not_covered` of a `Running`.
Rows: TypeAlias = tuple[int, int, NotCovered | None]


class Policies:
    """The policies of an engine.

    `ends_choices`: whether the scheduler ends a request once one choice is left.
    """

    def __init__(
        self, settings: Settings, configs: Mapping[str, ArtifactConfig], ends_choices: bool
    ) -> None:
        """See `Admission`."""
        self.configs = configs
        self.have_adapters = any(config.adapter for config in configs.values())
        self._adapters_bring_policies = settings.exit_points is not None
        self.ends_choices = ends_choices
        self._of_base = {name: one for name, one in configs.items() if one.adapter is None}

    @property
    def ambiguous(self) -> list[list[str]]:
        """Groups of policies for the same requests, which must name one of them."""
        adapters = {config.adapter for config in self.configs.values()}
        groups = {group for adapter in adapters for group in self._ambiguous_for(adapter)}
        return [list(names) for names in sorted(groups) if len(names) > 1]

    def _ambiguous_for(self, adapter: Adapter | None) -> set[tuple[str, ...]]:
        """The policies that fit requests with `adapter`, for each output they may want."""
        own = {name: config for name, config in self.configs.items() if config.adapter == adapter}
        promised = {Output.of_config(config) for config in own.values()}
        sets = {one.labels for one in promised if one.form is not Form.CHOICE}
        # Pools may share labels that none of them has exactly.
        shared = {one & other for one in sets for other in sets if one and other}
        sets |= shared | {both - {label} for both in shared for label in both}
        outputs = promised | {Output(form, labels) for labels in sets for form in Form}
        return {tuple(self._fitting(output, own)) for output in outputs}

    def select(self, request: Running, candidates: Mapping[str, ArtifactConfig]) -> str | None:
        """Name of the policy that decides a request; None if the request runs at full depth.

        `candidates` are the policies for its adapter, or for the base model.
        """
        output, name = request.output, request.kind or request.settings.adainfer_policy
        if output is None:
            return None
        if name is None:
            fitting = self._fitting(output, candidates)
            name = fitting[0] if len(fitting) == 1 else None
        if name is None or name not in candidates:
            return None
        return name if self._covers(candidates[name], output, request.max_tokens) else None

    def _covers(self, config: ArtifactConfig, output: Output, max_tokens: int) -> bool:
        """Whether a policy's bound covers an output of up to `max_tokens` tokens.

        A bound calibrated on one token covers requests for one token only. One calibrated on more
        covers the first tokens of a request of any length.
        """
        if not output.is_promised_by(config):
            return False
        if config.objects is not None:  # with the token that ends it
            return max_tokens > config.objects.longest
        if output.form is Form.CHOICE:  # its first token decides it
            longest = max(len(choice.token_ids) for choice in config.choices)
            return self.ends_choices and max_tokens > longest  # with the token that ends it
        return max_tokens == 1 or config.max_tokens > 1

    def selectable(self, request: Running, adapter: LoRARequest | None) -> Iterator[str]:
        """The policies that may decide a request, whatever weights its adapter turns out to have.

        The scheduler does not read an adapter's files, and several policies may be for adapters of
        the same name.
        """
        named = self.for_adapter_name(adapter)
        groups = [named] if adapter is None else [{name: one} for name, one in named.items()]
        selected = (self.select(request, group) for group in groups)
        return (name for name in selected if name is not None)

    def may_decide(self, request: Running, adapter: LoRARequest | None) -> bool:
        """Whether one may decide a request, such as a policy that vLLM loads with the adapter."""
        if adapter is not None and self._adapters_bring_policies and request.output is not None:
            return True
        return any(True for _ in self.selectable(request, adapter))

    def for_adapter(
        self, adapter: LoRARequest | None, fingerprint: str | None
    ) -> Mapping[str, ArtifactConfig]:
        """The policies for requests with an adapter; None is the base model.

        `fingerprint` is that of the adapter's weights, as vLLM has loaded them.
        """
        named = self.for_adapter_name(adapter)
        if adapter is None:
            return named
        matching = {
            name: config
            for name, config in named.items()
            if config.adapter is not None and config.adapter.fingerprint == fingerprint
        }
        for name in named.keys() - matching:
            logger.warning_once(
                "requests with the adapter %s run at full depth: policy %s was calibrated for "
                "another adapter of this name: calibrate with --lora %s=%s",
                adapter.lora_name,
                name,
                adapter.lora_name,
                adapter.lora_path,
            )
        return matching

    def for_adapter_name(self, adapter: LoRARequest | None) -> Mapping[str, ArtifactConfig]:
        """The policies for an adapter of this name, whatever its weights."""
        if adapter is None:
            return self._of_base
        return {
            name: config
            for name, config in self.configs.items()
            if config.adapter is not None and config.adapter.name == adapter.lora_name
        }

    def _fitting(self, output: Output, candidates: Mapping[str, ArtifactConfig]) -> list[str]:
        """The policies for a requested output, for a request that names none.

        Exactly the requested labels beat a pool with more. Among those left, policies that promise
        the token alone beat policies for probabilities where the token is enough: they save more.
        """
        configs = {n: config for n, config in candidates.items() if output.is_promised_by(config)}
        exact = [name for name, config in configs.items() if output.has_labels_of(config)]
        names = exact or list(configs)
        return [name for name in names if not configs[name].promise.reads_probabilities] or names


class ThresholdRows:
    """The threshold rows of an engine's policies.

    `first` is the first row of each part of a policy, by its name, as `PolicySet` numbers them.
    """

    def __init__(
        self, configs: Mapping[str, ArtifactConfig], only_known: bool, any_prompt: bool = False
    ) -> None:
        """Number the rows of `configs`.

        `only_known`: only requests with a known question exit. `any_prompt`: prompts exit that lack
        the tokens which those of the calibration share.
        """
        self._shared = {} if any_prompt else {n: config.shared for n, config in configs.items()}
        self._parts = all_parts(configs)
        self._names = {name: tuple(config.parts(name)) for name, config in configs.items()}
        firsts = first_threshold_rows(part.num_threshold_rows for part in self._parts.values())
        self.first = dict(zip(self._parts, firsts, strict=True))
        self._epsilons = [
            level.epsilon
            for part in self._parts.values()
            for _ in range(part.num_threshold_rows // len(part.levels))
            for level in part.levels
        ]
        self._known = {
            name: asked_among(question.ends for question in part.questions)
            for name, part in self._parts.items()
            if part.by_question or only_known
        }

    def of(self, policy: str, epsilon: float | None, prompt: Sequence[int]) -> Rows:
        """Those of a request for a policy, by its bound and its prompt."""
        if policy in self._shared and not self._shared[policy].are_in(prompt):
            return FULL_DEPTH, FULL_DEPTH, "other_prompt"
        if policy in self._known and self._known[policy](prompt) is None:
            return FULL_DEPTH, FULL_DEPTH, "unknown_question"
        whole, *last_token = self._names[policy]
        row = last_token_row = FULL_DEPTH
        try:
            row = self._of_part(whole, epsilon, prompt)
        except AdaInferError:  # with what the client asks for, each of its requests logs a line
            logger.warning_once(
                "requests run at full depth where they ask for a stricter bound than the strictest "
                "of policy %s, which is %g",
                policy,
                min(level.epsilon for level in self._parts[whole].levels),
            )
        for part in last_token:
            with suppress(AdaInferError):  # it may certify fewer epsilons
                last_token_row = self._of_part(part, epsilon, prompt)
        return row, last_token_row, None

    def epsilon_of(self, row: int) -> float | None:
        """The bound that a row keeps; None for `FULL_DEPTH`."""
        return None if row == FULL_DEPTH else self._epsilons[row]

    def _of_part(self, name: str, epsilon: float | None, prompt: Sequence[int]) -> int:
        """The row for a prompt in a part; an AdaInferError if that does not certify `epsilon`."""
        part = self._parts[name]
        level = part.level_of(epsilon)
        if level < 0:
            return FULL_DEPTH
        question = None
        if name in self._known:
            question = self._known[name](prompt)
            if question is None:
                return FULL_DEPTH
        row = part.threshold_row(level, question)
        return FULL_DEPTH if row is None else self.first[name] + row
