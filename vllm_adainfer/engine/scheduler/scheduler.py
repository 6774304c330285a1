"""vLLM's schedulers with a guarded prefix cache, early-ending choices and request capture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.resolved import attach_resolved, params_of, resolved_of
from vllm_adainfer.engine.compat.arrival import tell_scheduler_of_arrivals
from vllm_adainfer.engine.compat.processes import end_with_starter
from vllm_adainfer.engine.compat.runner import attached_note
from vllm_adainfer.engine.compat.scheduler import expect_more_tokens, not_ahead, sampled_tokens
from vllm_adainfer.engine.compat.stats import attach_report
from vllm_adainfer.engine.pinned_artifacts import served_configs
from vllm_adainfer.engine.scheduler.audit import AuditingScheduler
from vllm_adainfer.engine.scheduler.capture import CapturingScheduler
from vllm_adainfer.engine.scheduler.kinds import KindCountingScheduler
from vllm_adainfer.engine.scheduler.own_texts import OwnTexts
from vllm_adainfer.engine.scheduler.prefix_cache import PrefixCacheGuard, refuse_kv_connector
from vllm_adainfer.engine.scheduler.rest_of_choice import RestOfChoice, check_tokenizer
from vllm_adainfer.exits.accounting.report import Reporter, Snapshot, StepNote
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object


class GuardedScheduler(_Scheduler):
    """Resolves requests on arrival, and keeps incomplete blocks out of the prefix cache.

    Must precede vLLM's class in the MRO.
    """

    kv_cache_manager: Any  # vLLM's KVCacheManager, or the guard around it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = read_settings(self.vllm_config.additional_config)
        assert settings is not None
        self.admission = Admission.from_config(self.vllm_config, settings)
        self._own_texts = None
        if self.admission.has_students:
            self._own_texts = OwnTexts(self.vllm_config, settings, self.admission)
            tell_scheduler_of_arrivals()
        self._counted: Snapshot | None = None
        self._reporter = Reporter()
        if self.cache_config.enable_prefix_caching and not self.admission.is_recording:
            self.kv_cache_manager = PrefixCacheGuard(
                self.kv_cache_manager, self._may_exit, self._complete, self._saving
            )

    def request_arrived(self, request: Request) -> None:
        """Resolve what follows from what the client sent.

        With a student, this runs in the thread that receives requests, beside the running step.
        """
        resolved = self.admission.resolve(
            request.request_id, params_of(request), request.lora_request, request.resumable
        )
        if self._own_texts is not None:
            resolved = replace(resolved, texts=self._own_texts.of(request, resolved))
        attach_resolved(request, resolved)

    @override
    def add_request(self, request: Request) -> None:
        """Add the request, which may have been resolved on arrival."""
        if resolved_of(request) is None:
            self.request_arrived(request)
        super().add_request(request)

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the guard that a new step starts."""
        if isinstance(self.kv_cache_manager, PrefixCacheGuard):
            self.kv_cache_manager.new_step()
        return super().schedule(*args, **kwargs)

    @override
    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Cache the blocks that the step completed, then process its output."""
        note: StepNote | None = attached_note(model_runner_output)
        if note is not None:
            if note.counted is not None:
                self._counted = note.counted
            if note.complete is not None and isinstance(self.kv_cache_manager, PrefixCacheGuard):
                self.kv_cache_manager.step_ended(note.complete)
        return super().update_from_output(scheduler_output, model_runner_output)

    @override
    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Add our report if the worker sent counters; vLLM calls this after each step."""
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)
        counted, self._counted = self._counted, None
        if stats is not None and counted is not None:
            attach_report(stats, self._reporter.report(counted))
        return stats

    def _may_exit(self, request: Request, computed: int) -> bool:
        """Whether `request` may exit in a step that starts after `computed` of its tokens."""
        resolved = resolved_of(request)
        if resolved is None or (
            resolved.force_full_depth_prefill and computed < request.num_prompt_tokens
        ):
            return False
        return resolved.may_exit

    def _saving(self, request: Request) -> tuple[str, float] | None:
        resolved = resolved_of(request)
        return None if resolved is None else resolved.saving

    def _complete(self, request: Request) -> None:
        """Run the prompt at full depth; the worker learns of the request only in this step."""
        resolved = resolved_of(request)
        assert resolved is not None, "only what may exit is completed"
        attach_resolved(request, replace(resolved, force_full_depth_prefill=True))


class FinishingScheduler(_Scheduler):
    """Ends a request with a choice in the step that leaves only one choice.

    Must precede a scheduler in the MRO. vLLM accepts several tokens from one step, as in
    speculative decoding, and stops at the end token.
    """

    structured_output_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rest_of_choice = RestOfChoice(self.structured_output_manager, self.max_model_len)
        self._finished = [0, 0]  # choices and appended tokens since the last report
        settings = read_settings(self.vllm_config.additional_config)
        assert settings is not None
        for name, config in served_configs(self.vllm_config, settings).items():
            if config.choices:
                check_tokenizer(self.structured_output_manager.tokenizer, name, config.choices)

    @override
    def add_request(self, request: Request) -> None:
        """Add the request, and prepare its choices."""
        super().add_request(request)
        self._rest_of_choice.arrived(request)

    @override
    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Append the rest of each choice to its sampled tokens, then process the output."""
        # Sampling masks are split by the number of tokens, and appended tokens have none.
        if scheduler_output.has_structured_output_requests and not self.return_sampling_mask:
            sampled = sampled_tokens(scheduler_output, model_runner_output, self.requests)
            for request, tokens in sampled:
                if rest := self._rest_of_choice.after(request, tokens):
                    tokens += rest
                    expect_more_tokens(self, request, len(rest))
                    self._finished[0] += 1
                    self._finished[1] += len(rest)
        return super().update_from_output(scheduler_output, model_runner_output)

    @override
    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Report how many choices were finished."""
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)
        if stats is not None and self._finished[0] and self.vllm_config.kv_transfer_config is None:
            attach_report(stats, {"choices": self._finished})
            self._finished = [0, 0]
        return stats


class AdaInferScheduler(GuardedScheduler, Scheduler):
    """Schedules a step once the last one has ended, as on a CPU."""


class AdaInferAsyncScheduler(GuardedScheduler, AsyncScheduler):
    """Schedules a step while the last one runs, as on a GPU."""

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step without requests that their token in flight may end.

        Otherwise their next token would be running when they end, through all the layers that an
        exit skipped.
        """
        with not_ahead(self._may_be_ending()):
            return super().schedule(*args, **kwargs)

    def _may_be_ending(self) -> Iterator[Request]:
        for request in self.running if self.admission.may_serve_choices else ():
            if request.num_output_placeholders == 1 and not request.num_output_tokens:
                resolved = resolved_of(request)
                if resolved is not None and resolved.may_end_after_first_token:
                    yield request


def build_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler of a configured engine, which from now on ends with its front process.

    vLLM 0.32 decides on ``async_scheduling`` after its config hooks, so the class is chosen here.
    """
    end_with_starter()
    settings = read_settings(vllm_config.additional_config)
    assert settings is not None
    if not settings.runs_stock:
        refuse_kv_connector(vllm_config)
    asynchronous = vllm_config.scheduler_config.async_scheduling
    scheduler_class: type[Scheduler]
    if settings.runs_stock:
        scheduler_class = AsyncScheduler if asynchronous else Scheduler
    else:
        scheduler_class = AdaInferAsyncScheduler if asynchronous else AdaInferScheduler
    if settings.finishes_choices:
        name = f"Finishing{scheduler_class.__name__}"
        scheduler_class = type(name, (FinishingScheduler, scheduler_class), {})
    if settings.audit is not None:
        name = f"Auditing{scheduler_class.__name__}"
        scheduler_class = type(name, (AuditingScheduler, scheduler_class), {})
    if settings.auto is not None:
        name = f"KindCounting{scheduler_class.__name__}"
        scheduler_class = type(name, (KindCountingScheduler, scheduler_class), {})
    if settings.capture is not None:
        name = f"Capturing{scheduler_class.__name__}"
        scheduler_class = type(name, (CapturingScheduler, scheduler_class), {})
    return scheduler_class(vllm_config=vllm_config, **kwargs)
