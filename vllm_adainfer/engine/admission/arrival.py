"""What the scheduler decides of a request when it arrives: all that follows from what was sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.auto.kinds import Kind, kind_names
from vllm_adainfer.engine.admission.policies import Policies
from vllm_adainfer.engine.admission.requested_output import (
    requested_output,
    requested_scores,
    wants_prompt_logprobs,
)
from vllm_adainfer.engine.admission.running import (
    UNLIMITED,
    Running,
    extra_arguments,
    is_for_pooling,
)
from vllm_adainfer.engine.admission.traffic_sample import GroupSample
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.requests import request_group
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.policy.script import SCRIPT_LABELS
from vllm_adainfer.promise.promise import Unit
from vllm_adainfer.settings.engine import Settings
from vllm_adainfer.settings.request import EXIT_ARG, RequestSettings, read_request

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_adainfer.engine.admission.running import Params

logger = get_logger(__name__)

TYPICAL_SAVING = 0.4  # of the layers, by a policy that is still to come; see docs/results.md
OPTED_OUT = RequestSettings.model_validate({EXIT_ARG: 0})
SCRIPTED_OUTPUT = Output(Form.TOKEN, frozenset(SCRIPT_LABELS))


class Arrival:
    """Decides what follows from what clients send, once for each request."""

    def __init__(self, settings: Settings, policies: Policies, logprobs_mode: str) -> None:
        """See `Admission`."""
        self._settings, self._policies = settings, policies
        self._logprobs_mode = logprobs_mode
        # Until something finds pools and questions.
        self.narrowed: Callable[[Kind, Sequence[int]], Kind] = lambda kind, _: kind
        configs = policies.configs.values()
        self._promises_order = any(config.promise.unit is Unit.QUERY for config in configs)
        # What a monitor counts as one is drawn as one: an order's queries, questions of one text.
        self._draws_groups = self._promises_order or any(c.most_together > 1 for c in configs)
        self._shadow = GroupSample(settings.shadow_rate, "shadow")

    def resolve(
        self,
        request_id: str,
        params: Params | None,
        adapter: LoRARequest | None = None,
        resumable: bool = False,
        prompt: Sequence[int] = (),
    ) -> Running:
        """Settle what follows from what a client sent; see `Running`.

        The result stays valid when artifacts are reloaded (see `check_replaces` in
        `engine/worker/served_policies.py`) or come with adapters. Without `params`, and if it is
        `resumable`, a request runs at full depth: its prompt is still being sent then, and later
        parts attend to earlier ones at every layer.
        """
        if params is None:
            return Running(OPTED_OUT)
        request = self.parse(_valid_settings(params), params)
        if resumable:
            return request.changed(output=None)
        kind = self._kind(request, adapter, prompt)
        # A kind may get a policy at any time.
        may_decide = kind is not None or self._policies.may_decide(request, adapter)
        is_choice = request.output is not None and request.output.form is Form.CHOICE
        asks = self._settings.compare and request.settings.adainfer_compare is True
        is_shadow = asks or self.is_shadow(request_id)
        scripted = self._scripted_row(request)
        return request.changed(
            may_exit=self._may_exit(request, may_decide) or scripted != FULL_DEPTH,
            may_end_after_first_token=may_decide and is_choice,
            saving=self._saving(request, kind, adapter),
            is_shadow=is_shadow,
            query=self._query(request_id) if is_shadow else None,
            objects=self._policy_for_object(request, adapter),
            kind=None if kind is None else self._name_of(kind),
            pool=kind.labels if kind is not None and kind.is_pool else (),
            threshold_row=scripted,
        )

    def parse(self, request: RequestSettings, params: Params) -> Running:
        """What needs no policy and no adapter."""
        settings, opted_in = self._settings, request.adainfer
        if opted_in is None:
            opted_in = settings.requests != "opt-in"
        if is_for_pooling(params):
            output = requested_scores(params) if opted_in else None
            return Running(request, output, max_tokens=1)
        output = None
        if opted_in:
            output = requested_output(params, self._logprobs_mode, settings.requests == "all")
        max_tokens = params.max_tokens or UNLIMITED
        return Running(request, output, max_tokens, wants_prompt_logprobs(params))

    def is_shadow(self, request_id: str) -> bool:
        """Whether a request that may exit runs to full depth instead, to compare the answers."""
        group = request_group(request_id) if self._draws_groups else None
        return self._shadow.has(request_id, group)

    def _query(self, request_id: str) -> str | None:
        """`Running.query` of a shadow request."""
        group = request_group(request_id) if self._promises_order else None
        return None if group is None else self._shadow.first_of(request_id, group)

    def _kind(
        self, request: Running, adapter: LoRARequest | None, prompt: Sequence[int]
    ) -> Kind | None:
        """The kind of a request on a server that calibrates itself; None if it never exits."""
        auto = self._settings.auto
        if auto is None or auto.watch or request.output is None:
            return None
        if request.settings.adainfer_epsilon == 0:
            return None  # its client asks for full depth, which earns no budget for others
        kind = kind_of_output(request.output, request.max_tokens, adapter)
        if kind is not None and kind.choices and not self._policies.ends_choices:
            return None  # it would run on, and no policy covers that
        if kind is None or kind.why_full_depth(auto.tolerance) is not None:
            return None
        return self.narrowed(kind, prompt)

    @cached_property
    def _name_of(self) -> Callable[[Kind], str]:
        """Names kinds; the directory exists once the engine is configured."""
        assert self._settings.auto is not None
        return kind_names(AutoDirectory(self._settings.auto.directory).salt)

    def _may_exit(self, request: Running, may_decide: bool) -> bool:
        """See `Running.may_exit`; `may_decide`: whether a policy may decide the request."""
        settings = self._settings
        if settings.record is not None or settings.exit_script is not None:
            return False
        epsilon = request.settings.adainfer_epsilon
        return may_decide and (settings.epsilon if epsilon is None else epsilon) != 0

    def _saving(
        self, request: Running, kind: Kind | None, adapter: LoRARequest | None
    ) -> tuple[str, float] | None:
        """See `Running.saving`."""
        if kind is not None:
            return self._name_of(kind), TYPICAL_SAVING
        policies = self._policies
        name = policies.select(request, policies.for_adapter_name(adapter))
        if name is None or policies.configs[name].max_tokens > 1:
            return None
        config = policies.configs[name]
        return name, config.levels[config.level_of(None)].layers_saved

    def _policy_for_object(self, request: Running, adapter: LoRARequest | None) -> str | None:
        """See `Running.objects`."""
        if request.output is None or not request.output.is_object:
            return None
        return self._policies.select(request, self._policies.for_adapter_name(adapter))

    def _scripted_row(self, request: Running) -> int:
        """Index of the exit point that a request names, if the script's labels can answer it."""
        layer, script = request.settings.adainfer_exit, self._settings.exit_script or ()
        if script and layer is not None and layer not in script:
            logger.warning_once(
                "requests run at full depth where their adainfer_exit is not in the exit_script"
            )
        if layer not in script or request.output != SCRIPTED_OUTPUT:
            return FULL_DEPTH
        return script.index(layer)


def _valid_settings(params: Params) -> RequestSettings:
    """A request's settings; `OPTED_OUT` if they are invalid.

    vLLM's frontend refuses such requests by `check_request`, but other callers reach the engine.
    """
    try:
        return read_request(extra_arguments(params))
    except AdaInferError:
        logger.warning_once(
            "requests run at full depth whose adainfer arguments are unknown or invalid; vLLM's "
            "server refuses them, and says why"
        )
        return OPTED_OUT


def kind_of(
    params: Params | None, adapter: LoRARequest | None, resumable: bool, logprobs_mode: str
) -> Kind | None:
    """The kind of a request; None unless it reads one answer of a fixed set.

    Called once per request, on arrival. The time is linear, and limited as in `requested_output`.
    Probabilities in the whole vocabulary count at any temperature, which does not change them;
    anything else only if it is greedy. `resumable`: whether its prompt is still being sent.
    """
    if params is None or resumable:
        return None
    if is_for_pooling(params):
        scores = requested_scores(params)
        return None if scores is None else kind_of_output(scores, 1, adapter)
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
    if output.form is Form.SCORES:
        return Kind("scores", adapter=name)
    if output.form is Form.OBJECT:
        return Kind("object", adapter=name, schema=output.schema)
    if not output.labels or max_tokens != 1:
        return None
    labels = tuple(sorted(output.labels))
    return Kind("label" if output.form is Form.TOKEN else "probabilities", labels, (), name)
