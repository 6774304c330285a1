"""The audit: a line for each request that ends, which says where its answer came from."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.v1.request import Request, RequestStatus

from vllm_adainfer.engine.compat.requests import short_id
from vllm_adainfer.engine.compat.runner import attached_note
from vllm_adainfer.engine.compat.scheduler import has_stale_output, pooled_output
from vllm_adainfer.engine.scheduler.line_files import LineFiles
from vllm_adainfer.exits.accounting.decided import Provenance
from vllm_adainfer.settings.engine import NO_POLICY, read_settings

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object

QUEUED = 65_536  # lines that may wait for the disk
LONGEST_ANSWER = 32  # tokens or scores that a line quotes
LONGEST_TRACE = 64  # characters of a `traceparent` of W3C; a client may send any text


@dataclass
class Trail:
    """Where the tokens of one request came from so far.

    Attributes:
        by: the last policy that decided a token of it; None before its first token.
        layers: tokens by the number of layers that they ran.
        outcomes: tokens by `DecidedToken.outcome`.

    """

    by: Provenance | None = None
    layers: Counter[int] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, token: Provenance) -> None:
        """Note one more token."""
        if self.by is None or token.policy != NO_POLICY:
            self.by = token
        self.layers[token.layers] += 1
        self.outcomes[token.outcome] += 1


class AuditingScheduler(_Scheduler):
    """Mixin that writes the audit; must precede the scheduler class in the MRO.

    A request runs exactly as it would without. What it costs is one tuple a token, from the worker,
    and one line a request, on another thread.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Open the directory.

        Raises:
            AdaInferError: this process cannot write to it.

        """
        super().__init__(*args, **kwargs)
        settings = read_settings(self.vllm_config.additional_config)
        assert settings is not None
        assert settings.audit is not None
        self._trails: dict[str, Trail] = {}
        self._steps: deque[Any] = deque()  # vLLM's descriptions of the steps that are running
        self._leaving: dict[str, Request] = {}  # ended from outside while such a step has them
        self._depth = self.vllm_config.model_config.hf_text_config.num_hidden_layers
        self._audit = LineFiles(
            "audit",
            self.vllm_config.parallel_config.data_parallel_index,
            settings.audit.directory,
            settings.audit.limit,
            QUEUED,
            tells_lost=True,
        )

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Keep in mind who is in the step."""
        step = super().schedule(*args, **kwargs)
        self._steps.append(step)
        return step

    @override
    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Note where the tokens of the step came from, and write of the requests that it ends."""
        while self._steps and self._steps.popleft() is not scheduler_output:
            pass
        note = attached_note(model_runner_output)
        decided: Iterable[Provenance] = () if note is None else note.decided
        running = []
        for token in decided:
            request = self.requests.get(token.request_id)
            if token.request_id not in self._leaving:
                if request is None or request.is_finished() or has_stale_output(request):
                    continue
                running.append(request)
            self._trails.setdefault(token.request_id, Trail()).add(token)
        output = super().update_from_output(scheduler_output, model_runner_output)
        for request in running:
            if request.is_finished():
                self._write(request, pooled_output(model_runner_output, request.request_id))
        for request in [one for one in self._leaving.values() if not self._is_running(one)]:
            del self._leaving[request.request_id]
            self._write(request)
        return output

    @override
    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        """Write of requests that end from outside, such as those whose client hung up.

        A step may be deciding a token of theirs, which the counters will have: wait for its end.
        """
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in ended:
            if self._is_running(request):
                self._leaving[request.request_id] = request
            else:
                self._write(request)
        return ended

    def _is_running(self, request: Request) -> bool:
        return any(request.request_id in step.num_scheduled_tokens for step in self._steps)

    def _write(self, request: Request, scores: list[float] | None = None) -> None:
        trail = self._trails.pop(request.request_id, Trail())
        self._audit.put(line_of(request, trail, scores, self._depth, time.time()))

    @override
    def shutdown(self) -> None:
        for request in self._leaving.values():
            self._write(request)
        self._audit.close()
        super().shutdown()


def line_of(
    request: Request, trail: Trail, scores: list[float] | None, depth: int, now: float
) -> dict[str, Any]:
    """The line about a request that has ended.

    Args:
        request: vLLM's request.
        trail: where its tokens came from.
        scores: those of a classifier; None for a request that generates.
        depth: the number of layers of the model.
        now: seconds since 1970.

    """
    by, reason = trail.by, request.get_finished_reason()
    trace = (request.trace_headers or {}).get("traceparent")
    tokens = list(request.output_token_ids)
    return {
        "time": round(now, 3),
        "request": short_id(request.request_id),
        **({} if trace is None else {"traceparent": str(trace)[:LONGEST_TRACE]}),
        "policy": None if by is None or by.policy == NO_POLICY else by.policy,
        "artifact": None if by is None or not by.artifact else by.artifact,
        "epsilon": None if by is None else by.epsilon,
        "outcomes": dict(trail.outcomes),
        "layers": {str(layers): count for layers, count in sorted(trail.layers.items())},
        "depth": depth,
        **({} if by is None or by.not_covered is None else {"not_covered": by.not_covered}),
        "answer": tokens[:LONGEST_ANSWER] if scores is None else scores[:LONGEST_ANSWER],
        "ended": None if reason is None else str(reason),
    }
