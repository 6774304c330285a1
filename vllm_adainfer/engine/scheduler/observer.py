"""What watches the scheduler: it hears of requests and of whole steps, never of single tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_adainfer.exits.accounting.report import Key, Snapshot, StepNote

if TYPE_CHECKING:
    from vllm.v1.request import Request

Tokens = list[int]


def no_logprobs(_: str) -> None:
    """Those of a step that has none."""


def keep_tokens(*_: object) -> None:
    """In a step without objects, none are replaced."""


@dataclass(frozen=True)
class Step:
    """A step that has run, before the scheduler takes its tokens.

    Attributes:
        rows: how many token rows it ran, by request id; of all requests that were in it.
        requests: those of them whose tokens count, by id; empty if no observer hears of ends. A
            request that was ended while its step ran is among them, one whose tokens vLLM drops is
            not.
        drafted: the tokens that it verified, by request id.
        note: what the worker says of it; None if there was nothing to run.
        choosing: the running requests with a grammar, and the tokens that were sampled for each;
            `with_preempted` also those that were preempted meanwhile, and get their tokens.
        append: lets tokens count as sampled: a request, its sampled tokens, and those to append.
        replace: lets other tokens count as sampled: a request, its sampled tokens, and the others;
            with what else may stand in the place of each, by token with its log-probability, that
            of the token itself first, if the request reads them.
        scores: what a classifier gave for a request id; None for a request that generates.
        logprobs: by request id, as `sampled_logprobs` of `compat`.
        scheduled_at: when it was scheduled, by `time.perf_counter`.

    """

    rows: Mapping[str, int]
    requests: Mapping[str, Request]
    note: StepNote | None
    choosing: Callable[..., Iterable[tuple[Request, Tokens]]]
    append: Callable[[Request, Tokens, Tokens], None]
    scores: Callable[[str], list[float] | None]
    logprobs: Callable[[str], Any] = no_logprobs
    replace: Callable[..., None] = keep_tokens
    drafted: Mapping[str, Tokens] = field(default_factory=dict)
    scheduled_at: float = 0.0


class Observer:
    """Watches requests; what a subclass does not define does nothing.

    Of each request it hears in this order: `arrived`, `stepped` with each step that the request was
    in, `ended`. All but `close` run between two steps, where everybody waits for them.
    """

    def arrived(self, request: Request) -> None:
        """A request has come; of one whose prompt is sent in parts, the first part."""

    def stepped(self, step: Step) -> None:
        """A step has run."""

    def ended(self, request: Request, why: str | None) -> None:
        """A request has ended, and so has every step that it was in; `why` in vLLM's words."""

    def report(self) -> Mapping[str, Any]:
        """What the frontends are to be told since the last report; empty for nothing.

        ``added`` has what a counter gains: its kind, its labels, and by how much. Everything else
        is the current state of something, under a key of its own.
        """
        return {}

    def close(self) -> None:
        """The engine stops."""


def report_of(observers: Iterable[Observer]) -> dict[str, Any]:
    """The reports of several observers in one; empty if there is nothing to tell."""
    told = [report for observer in observers if (report := observer.report())]
    together = {key: value for report in told for key, value in report.items()}
    added = [entry for report in told for entry in report.get("added", ())]
    return {**together, "added": added} if told else {}


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
