"""Passes the counters of the workers on to the frontends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from vllm_adainfer.engine.scheduler.observer import Observer, Step
from vllm_adainfer.exits.accounting.report import Reporter, Snapshot


class Counters(Observer):
    """Reports what was counted since the last report, once a worker has sent it."""

    def __init__(self) -> None:
        self._counted: Snapshot | None = None
        self._reporter = Reporter()

    @override
    def stepped(self, step: Step) -> None:
        if step.note is not None and step.note.counted is not None:
            self._counted = step.note.counted

    @override
    def report(self) -> Mapping[str, Any]:
        counted, self._counted = self._counted, None
        return {} if counted is None else self._reporter.report(counted)
