"""Counts which kinds of one-answer requests come, in the scheduler; no answer changes."""

from __future__ import annotations

import time
from contextlib import ExitStack
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.kind_reports import KindReporter
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.pools import pools
from vllm_adainfer.auto.table import KindCount, KindTable
from vllm_adainfer.engine.admission.kind_of import kind_of, kind_of_output
from vllm_adainfer.engine.admission.resolved import params_of, resolved_of
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.stats import attach_report
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object

logger = get_logger(__name__)

WRITE_SECONDS = 5.0
CLOSE_SECONDS = 5.0  # how long a stopping engine waits for the disk
REPORT_SECONDS = 0.25


class KindFile:
    """Writes the counts to a directory's file, on a thread of its own.

    The counts of earlier runs of the server are gone on from, unless it served another model. While
    another server counts in the directory, nothing is written.
    """

    def __init__(self, directory: AutoDirectory, **facts: Any) -> None:
        """Read what an earlier run left, and start the thread.

        Args:
            directory: where the file is.
            facts: what else the file says; it begins anew if they are others.

        """
        self._directory, self._facts, self._salt = directory, facts, directory.salt
        self._table, self._lock = KindTable(), Lock()
        before = read_json(directory.kinds)
        if isinstance(before, dict) and all(before.get(key) == facts[key] for key in facts):
            self._table.restore(before)
        self.reporter = KindReporter(self._table, self._salt)
        self._held: ExitStack | None = None
        self._written: tuple[int, int] | None = None
        self._failed = False
        self._closed = Event()
        self._thread = Thread(target=self._write_often, name="adainfer-kinds", daemon=True)
        self._thread.start()

    def arrived(self, kind: Kind | None, prompt_tokens: int) -> KindCount:
        """See `KindTable.arrived`."""
        with self._lock:
            return self._table.arrived(kind, prompt_tokens, time.time())

    def ran(self, tokens: int) -> None:
        """Count the token rows of a step."""
        self._table.tokens += tokens

    def close(self) -> None:
        """Write the last counts; give up on a disk that hangs."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _write_often(self) -> None:
        while not self._closed.wait(WRITE_SECONDS):
            self._write()
        self._write()
        if self._held is not None:
            self._held.close()

    def _holds(self) -> bool:
        """Whether this server counts in the directory, and no other one does."""
        with ExitStack() as stack:
            if self._held is None and stack.enter_context(self._directory.held("counts")):
                self._held = stack.pop_all()
        return self._held is not None

    def _write(self) -> None:
        counted = self._table.requests, self._table.tokens
        if counted == self._written:
            return
        try:
            if not self._holds():
                logger.warning_once(
                    "another server counts kinds in %s, so this one's counts are not written "
                    'there: give each server an "auto" directory of its own',
                    self._directory.root,
                )
                return
            with self._lock:
                content = {**self._facts, **self._table.as_dict(self._salt)}
                labels = list(self._table)
            content["pools"] = [pool.as_dict() for pool in pools(labels)]
            write_json(self._directory.kinds, content)
            self._written = counted
        except Exception as error:  # whatever it was, the next time may succeed
            if not self._failed:
                logger.warning(
                    "the counts of kinds could not be written to %s (%s); this is tried again, and "
                    "this warning is not repeated",
                    self._directory.kinds,
                    error,
                )
            self._failed = True


class KindCountingScheduler(_Scheduler):
    """Mixin that counts kinds; must precede the scheduler class in the MRO.

    A request runs exactly as it would without. What it costs is a look at its parameters on
    arrival, and an addition for each request of a step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Open the directory.

        Raises:
            AdaInferError: this process cannot write to it.

        """
        super().__init__(*args, **kwargs)
        settings = read_settings(self.vllm_config.additional_config)
        assert settings is not None
        assert settings.auto is not None
        directory = AutoDirectory(settings.auto.directory)
        directory.create()
        model = self.vllm_config.model_config
        self._kinds = KindFile(
            directory,
            model=model.served_model_name,
            tokenizer=str(model.tokenizer),
        )
        self._counts: dict[str, KindCount] = {}
        self._next_report = 0.0

    @override
    def add_request(self, request: Request) -> None:
        """Add the request, and count it; of one whose prompt is sent in parts, the first part."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if not is_new:
            return
        kind = self._kind_of(request)
        count = self._kinds.arrived(kind, request.num_prompt_tokens)
        self._counts[request.request_id] = count

    def _kind_of(self, request: Request) -> Kind | None:
        """The kind of a request, by what was resolved of it if something was."""
        resolved, adapter = resolved_of(request), request.lora_request
        if resolved is not None and resolved.output is not None:
            return kind_of_output(resolved.output, resolved.max_tokens, adapter)
        mode = self.vllm_config.model_config.logprobs_mode
        return kind_of(params_of(request), adapter, request.resumable, mode)

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and count the token rows that it runs."""
        output = super().schedule(*args, **kwargs)
        counts = self._counts
        for request_id in output.finished_req_ids:
            if request_id not in self.requests:  # another one may have come under its name
                counts.pop(request_id, None)
        for request_id, tokens in output.num_scheduled_tokens.items():
            if (count := counts.get(request_id)) is not None:
                count.tokens += tokens
        self._kinds.ran(output.total_num_scheduled_tokens)
        return output

    @override
    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Report what came, now and then and once no work is left."""
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)
        if stats is None or self.vllm_config.kv_transfer_config is not None:
            return stats
        now = time.monotonic()
        if now >= self._next_report or not self.has_unfinished_requests():
            self._next_report = now + REPORT_SECONDS
            if added := self._kinds.reporter.report():
                attach_report(stats, {"kinds": added})
        return stats

    @override
    def shutdown(self) -> None:
        self._kinds.close()
        super().shutdown()
