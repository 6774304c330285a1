"""Passes the counters of the workers on to the frontends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from vllm_adainfer.engine.scheduler.observer import Observer, Step
from vllm_adainfer.exits.accounting.report import Key, Snapshot


class Counters(Observer):
    """Reports what was counted since the last report, once a worker has sent it.

    A report is an increment because it goes to one of several frontends, which add them up.
    """

    def __init__(self) -> None:
        self._counted: Snapshot | None = None
        self._sent: dict[Key, float] = {}

    @override
    def stepped(self, step: Step) -> None:
        if step.note is not None and step.note.counted is not None:
            self._counted = step.note.counted

    @override
    def report(self) -> Mapping[str, Any]:
        counted, self._counted = self._counted, None
        if counted is None:
            return {}
        before, self._sent = self._sent, counted["counts"]
        added = [(*key, count - before.get(key, 0)) for key, count in self._sent.items()]
        state = {key: value for key, value in counted.items() if key != "counts"}
        return {"added": [entry for entry in added if entry[-1]], **state}
