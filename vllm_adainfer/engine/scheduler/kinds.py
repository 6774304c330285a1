"""Counts which kinds of one-answer requests come, in the scheduler; no answer changes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import KindCount, KindTable, pools
from vllm_adainfer.engine.admission.arrival import kind_of, kind_of_output
from vllm_adainfer.engine.admission.requested_output import requested_fields
from vllm_adainfer.engine.admission.running import params_of, resolved_of
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.scheduler.observer import Observer, Step

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = get_logger(__name__)

WRITE_SECONDS = 5.0
CLOSE_SECONDS = 5.0  # how long a stopping engine waits for the disk
REPORT_SECONDS = 0.25


class KindCounts(Observer):
    """Counts kinds, in a file of a directory that a thread of its own writes.

    A request runs exactly as it would without. What it costs is a look at its parameters on
    arrival, and an addition for each request of a step. The counts of earlier runs of the server
    are gone on from, unless it served another model. While another server counts in the directory,
    nothing is written.
    """

    def __init__(
        self, directory: str, logprobs_mode: str, calibrates: bool = False, **facts: Any
    ) -> None:
        """Read what an earlier run left in the directory, and start the thread.

        `logprobs_mode`, vLLM's, says what a read of probabilities gets. `calibrates`: the
        server makes policies for kinds, and finds pools and questions. `facts` are what else the
        file says; it begins anew if they are others. An AdaInferError if this process cannot write.
        """
        self._directory = AutoDirectory(directory)
        self._directory.create()
        self._facts, self._mode, self._calibrates = facts, logprobs_mode, calibrates
        self._table, self._lock = KindTable(self._directory.salt), Lock()
        before = read_json(self._directory.kinds)
        if isinstance(before, dict) and all(before.get(key) == facts[key] for key in facts):
            self._table.restore(before)
        self._counts: dict[str, tuple[Request, KindCount, str]] = {}
        self._added: Counter[tuple[str, str]] = Counter()  # by series and label
        self._next_report = 0.0
        self._held: ExitStack | None = None
        self._written: tuple[int, int] | None = None
        self._failed = False
        self._closed = Event()
        self._thread = Thread(target=self._write_often, name="adainfer-kinds", daemon=True)
        self._thread.start()

    @override
    def arrived(self, request: Request) -> None:
        kind = self._kind_of(request)
        with self._lock:
            count = self._table.arrived(kind, request.num_prompt_tokens, time.time())
            if kind is not None and self._calibrates:
                self._table.note_ending(kind, request.prompt_token_ids or ())
        label = self._table.label_of(count)
        self._added["kind_requests", label] += 1
        self._counts[request.request_id] = request, count, label

    def _kind_of(self, request: Request) -> Kind | None:
        """The kind of a request, by what was resolved of it if something was."""
        resolved, adapter = resolved_of(request), request.lora_request
        if resolved is not None and resolved.output is not None:
            kind = kind_of_output(resolved.output, resolved.max_tokens, adapter)
        else:
            kind = kind_of(params_of(request), adapter, request.resumable, self._mode)
        if kind is None or kind.schema is None or request.sampling_params is None:
            return None if kind is None else self.narrowed(kind, request.prompt_token_ids or ())
        return replace(kind, paths=requested_fields(request.sampling_params))

    def narrowed(self, kind: Kind, prompt: Sequence[int]) -> Kind:
        """See `KindTable.narrowed`."""
        return self._table.narrowed(kind, prompt)

    @override
    def stepped(self, step: Step) -> None:
        """Count the token rows of the step."""
        for request_id, rows in step.rows.items():
            if request_id in self._counts:
                _, count, label = self._counts[request_id]
                count.tokens += rows
                self._added["kind_tokens", label] += rows
        self._table.tokens += sum(step.rows.values())

    @override
    def ended(self, request: Request, why: str | None) -> None:
        counted = self._counts.get(request.request_id)
        if counted is not None and counted[0] is request:  # another one may have its name by now
            del self._counts[request.request_id]

    @override
    def report(self) -> Mapping[str, Any]:
        """What came, now and then and once no work is left."""
        now = time.monotonic()
        is_idle = all(request.is_finished() for request, *_ in self._counts.values())
        if now < self._next_report and not is_idle:
            return {}
        self._next_report = now + REPORT_SECONDS
        added, self._added = self._added, Counter()
        told = [(*series, count) for series, count in added.items()]
        return {"added": told, "reads": self._table.reads} if told else {}

    @override
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

    def _write(self) -> None:
        counted = self._table.requests, self._table.tokens
        if counted == self._written:
            return
        try:
            with ExitStack() as stack:
                if self._held is None and stack.enter_context(self._directory.held("counts")):
                    self._held = stack.pop_all()
            if self._held is None:
                logger.warning_once(
                    "another server counts kinds in %s, so this one's counts are not written "
                    'there: give each server an "auto" directory of its own',
                    self._directory.root,
                )
                return
            with self._lock:
                if self._calibrates:
                    self._table.find_pools()
                    self._table.find_questions()
                content = {**self._facts, **self._table.as_dict()}
                labels = list(self._table)
            content["pools"] = pools(labels)
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
