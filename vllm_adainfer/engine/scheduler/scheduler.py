"""vLLM's schedulers with observers, and what early exits need of them.

On arrival, a request is resolved: all that follows from what its client sent. While it runs, its
incomplete blocks stay out of the prefix cache. With asynchronous scheduling, no step is scheduled
ahead of a token that may end its request. Everything else watches, see `observers_of`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.running import Running, attach_resolved, params_of, resolved_of
from vllm_adainfer.engine.compat.drafts import masks_for_drafts
from vllm_adainfer.engine.compat.processes import end_with_starter
from vllm_adainfer.engine.compat.runner import attached_note
from vllm_adainfer.engine.compat.scheduler import (
    append_tokens,
    attach_written_objects,
    fewer_tokens,
    is_output_dropped,
    pooled_output,
    replace_tokens,
    sampled_logprobs,
    sampled_tokens,
    tell_scheduler_of_arrivals,
    wait_for_token,
)
from vllm_adainfer.engine.compat.stats import attach_report
from vllm_adainfer.engine.scheduler.drafts import Drafts
from vllm_adainfer.engine.scheduler.guesses import with_guesses
from vllm_adainfer.engine.scheduler.objects import WrittenObjects
from vllm_adainfer.engine.scheduler.observer import Observer, Step, report_of
from vllm_adainfer.engine.scheduler.observers import observers_of
from vllm_adainfer.engine.scheduler.prefix_cache import PrefixCacheGuard, refuse_kv_connector
from vllm_adainfer.engine.scheduler.prompt_texts import texts_for_students
from vllm_adainfer.settings.engine import Settings, read_settings

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object


class ObservedScheduler(_Scheduler):
    """Mixin over vLLM's schedulers; must precede them in the MRO.

    `admission` resolves requests; None where the engine runs stock vLLM. `observers` watch.
    `drafts` is the one of them that adds to steps; None where nothing is drafted.
    """

    kv_cache_manager: Any  # vLLM's KVCacheManager, or the guard around it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make what the engine switch asks for."""
        super().__init__(*args, **kwargs)
        settings = settings_of(self.vllm_config)
        self.admission: Admission | None = None
        self._guard: PrefixCacheGuard | None = None
        self._texts: Callable[[Request, Running], Mapping[str, tuple[int, ...]]] | None = None
        self._guess: Callable[[Request, Running], Running] | None = None
        if not settings.runs_stock:
            self._make_exits(settings)
        self.observers = observers_of(self.vllm_config, settings, self)
        self.drafts = next((one for one in self.observers if isinstance(one, Drafts)), None)
        of_objects = (one for one in self.observers if isinstance(one, WrittenObjects))
        self._objects = next(of_objects, None)
        # vLLM's descriptions of the steps that run, and when each was scheduled.
        self._running: deque[tuple[Any, float]] = deque()
        self._leaving: dict[str, Request] = {}  # ended from outside while such a step has them

    def _make_exits(self, settings: Settings) -> None:
        self.admission = Admission.from_config(self.vllm_config, settings)
        if self.admission.has_students:
            self._texts = texts_for_students(self.vllm_config, settings, self.admission)
            tell_scheduler_of_arrivals()
        if self.admission.has_objects:
            self._guess = with_guesses(self.vllm_config, settings)
        if self.cache_config.enable_prefix_caching and not self.admission.is_recording:
            self.kv_cache_manager = self._guard = PrefixCacheGuard(self.kv_cache_manager)

    def request_arrived(self, request: Request) -> None:
        """Resolve what follows from what the client sent.

        With a student, this runs in the thread that receives requests, beside the running step.
        """
        if self.admission is None:
            return
        resolved = self.admission.arrival.resolve(
            request.request_id,
            params_of(request),
            request.lora_request,
            request.resumable,
            request.prompt_token_ids or (),
        )
        if self._texts is not None:
            resolved = resolved.changed(texts=self._texts(request, resolved))
        if self._guess is not None:
            resolved = self._guess(request, resolved)
        attach_resolved(request, resolved)

    @override
    def add_request(self, request: Request) -> None:
        """Add the request, which may have been resolved on arrival."""
        if resolved_of(request) is None:
            self.request_arrived(request)
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if is_new:  # otherwise it is a further part of a prompt that is sent in parts
            for observer in self.observers:
                observer.arrived(request)

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and keep in mind who is in it."""
        if self._guard is not None:
            self._guard.new_step()
        if self.drafts is None:
            step = super().schedule(*args, **kwargs)
        else:
            with fewer_tokens(self, self.drafts.tokens_of_guesses()):
                step = super().schedule(*args, **kwargs)
            self.drafts.plan(step)
        if self._objects is not None and (read := self._objects.take_read()):
            attach_written_objects(step, read)
        self._running.append((step, time.perf_counter()))
        return step

    @override
    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        """The masks of a step, one for each drafted token, too."""
        with masks_for_drafts(self.structured_output_manager, scheduler_output):
            return super().get_grammar_bitmask(scheduler_output)

    @override
    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> Any:
        """None for our drafts, which vLLM's statistics have no room for."""
        if self.drafts is not None:
            return None
        return super().make_spec_decoding_stats(*args, **kwargs)

    @override
    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Cache the blocks that the step completed, tell the observers, and process its output."""
        scheduled, at = None, 0.0
        while self._running and scheduled is not scheduler_output:
            scheduled, at = self._running.popleft()
        step = self._step_of(scheduler_output, model_runner_output, at)
        if self._guard is not None and step.note is not None and step.note.complete is not None:
            self._guard.step_ended(step.note.complete)
        for observer in self.observers:
            observer.stepped(step)
        output = super().update_from_output(scheduler_output, model_runner_output)
        for request in step.requests.values():
            if request.is_finished() and request.request_id not in self._leaving:
                self._tell_ended(request)
        for request in [one for one in self._leaving.values() if not self._is_running(one)]:
            del self._leaving[request.request_id]
            self._tell_ended(request)
        return output

    def _step_of(self, scheduler_output: Any, runner_output: Any, scheduled_at: float) -> Step:
        rows = scheduler_output.num_scheduled_tokens
        hears_ends = any(type(one).ended is not Observer.ended for one in self.observers)
        requests = {}
        for request_id in rows if hears_ends else ():
            request = self.requests.get(request_id)
            if request_id in self._leaving:
                requests[request_id] = self._leaving[request_id]
            elif request and not request.is_finished() and not is_output_dropped(request):
                requests[request_id] = request
        return Step(
            rows=rows,
            requests=requests,
            note=attached_note(runner_output),
            choosing=partial(
                sampled_tokens,
                scheduler_output,
                runner_output,
                self.requests,
                with_drafts=self.drafts is not None,
            ),
            append=partial(append_tokens, self, scheduler_output),
            replace=partial(replace_tokens, scheduler_output, runner_output),
            scores=partial(pooled_output, runner_output),
            logprobs=partial(sampled_logprobs, runner_output),
            drafted=scheduler_output.scheduled_spec_decode_tokens,
            scheduled_at=scheduled_at,
        )

    @override
    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        """End requests from outside, such as those whose client hung up.

        A step may be deciding a token of theirs, which the counters will have: wait for its end.
        """
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in ended:
            if self._is_running(request):
                self._leaving[request.request_id] = request
            else:
                self._tell_ended(request)
        return ended

    def _is_running(self, request: Request) -> bool:
        return any(request.request_id in step.num_scheduled_tokens for step, _ in self._running)

    def _tell_ended(self, request: Request) -> None:
        reason = request.get_finished_reason()
        for observer in self.observers:
            observer.ended(request, None if reason is None else str(reason))

    @override
    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Add the observers' reports; vLLM calls this after each step."""
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)
        if stats is None or self.vllm_config.kv_transfer_config is not None:
            return stats
        if report := report_of(self.observers):
            attach_report(stats, report)
        return stats

    @override
    def shutdown(self) -> None:
        """Stop; a request whose last step never came back has ended, too."""
        for request in self._leaving.values():
            self._tell_ended(request)
        for observer in self.observers:
            observer.close()
        super().shutdown()


class AdaInferScheduler(ObservedScheduler, Scheduler):
    """Schedules a step once the last one has ended, as on a CPU."""


class AdaInferAsyncScheduler(ObservedScheduler, AsyncScheduler):
    """Schedules a step while the last one runs, as on a GPU."""

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step without requests that must know their token in flight.

        It may end them: otherwise their next token would be running when they end, through all the
        layers that an exit skipped. Or a draft would follow it.
        """
        if self.drafts is not None:
            for request in self.drafts.waiting():
                wait_for_token(self, request)
        if self.admission is not None and self.admission.may_serve_choices:
            for request in self._may_be_ending():
                wait_for_token(self, request)
        return super().schedule(*args, **kwargs)

    def _may_be_ending(self) -> Iterator[Request]:
        for request in self.running:
            if request.num_output_placeholders == 1 and not request.num_output_tokens:
                resolved = resolved_of(request)
                if resolved is not None and resolved.may_end_after_first_token:
                    yield request


def settings_of(vllm_config: VllmConfig) -> Settings:
    """The engine switch of an engine that has it."""
    settings = read_settings(vllm_config.additional_config)
    assert settings is not None
    return settings


def build_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler of a configured engine, which from now on ends with its front process.

    vLLM 0.32 decides on ``async_scheduling`` after its config hooks, so the class is chosen here.
    """
    end_with_starter()
    if not settings_of(vllm_config).runs_stock:
        refuse_kv_connector(vllm_config)
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_class = AdaInferAsyncScheduler if is_async else AdaInferScheduler
    return scheduler_class(vllm_config=vllm_config, **kwargs)
