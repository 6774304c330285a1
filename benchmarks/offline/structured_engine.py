"""An engine under a fixed number of requests in flight, with its steps, rows and drafts counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

STOCK, OURS = "stock", "adainfer"


@dataclass(frozen=True)
class Request:
    """A rendered prompt, and how its answer is sampled."""

    prompt: list[int]
    params: SamplingParams


@dataclass
class Counts:
    """What an engine did: steps with rows, their rows, drafted tokens, and those kept of them."""

    steps: int = 0
    rows: int = 0
    drafted: int = 0
    kept: int = 0


@dataclass
class Sent:
    """Answers in the order of their requests, their seconds, those of all, and what it took."""

    texts: list[str]
    latencies: list[float]
    seconds: float
    tokens: int
    counts: Counts


@dataclass
class Engine:
    """One of vLLM's engines in this process, stock or ours."""

    llm: LLM
    counts: Counts = field(default_factory=Counts)
    _sent: int = 0

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]

    def send(self, requests: Sequence[Request], in_flight: int) -> Sent:
        """Answer `requests`, of which `in_flight` run at once, from an empty prefix cache."""
        core, self.counts = self.llm.llm_engine, Counts()
        if not core.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use")
        texts, started, latencies = [""] * len(requests), {}, [0.0] * len(requests)
        waiting = iter(range(len(requests)))
        running: dict[str, int] = {}
        tokens, start = 0, time.perf_counter()
        while True:
            while len(running) < in_flight and (place := next(waiting, None)) is not None:
                running[self.add(requests[place])] = place
                started[place] = time.perf_counter()
            if not running:
                break
            for output in core.step():
                if not output.finished:
                    continue
                place = running.pop(output.request_id)
                latencies[place] = time.perf_counter() - started[place]
                answer = output.outputs[0]  # type: ignore[union-attr]
                texts[place], tokens = answer.text, tokens + len(answer.token_ids)
        return Sent(texts, latencies, time.perf_counter() - start, tokens, self.counts)

    def add(self, request: Request) -> str:
        """Add a request; returns its id."""
        self._sent += 1
        name, prompt = str(self._sent), {"prompt_token_ids": request.prompt}
        self.llm.llm_engine.add_request(name, prompt, request.params.clone())  # type: ignore[arg-type]
        return name

    def count(self) -> None:
        """Count from now on, where the scheduler is told what a step did."""
        stock = self.scheduler.update_from_output

        def update_from_output(scheduled: Any, ran: Any) -> Any:
            drafts = scheduled.scheduled_spec_decode_tokens
            self.counts.steps += bool(scheduled.num_scheduled_tokens)
            self.counts.rows += scheduled.total_num_scheduled_tokens
            for name, draft in drafts.items():
                sampled = ran.sampled_token_ids[ran.req_id_to_index[name]]
                self.counts.drafted += len(draft)
                self.counts.kept += max(0, len(sampled) - 1)
            return stock(scheduled, ran)

        mock.patch.object(self.scheduler, "update_from_output", update_from_output).start()


@contextmanager
def engines(
    model: str, switches: Mapping[str, dict[str, Any] | None], longest: int, **settings: Any
) -> Iterator[dict[str, Engine]]:
    """Engines side by side, by name, each with its switch; None is stock vLLM.

    `longest` is the length of the longest prompt with its answer, in tokens; `settings` are further
    arguments of `vllm.LLM`.
    """
    started: dict[str, Engine] = {}
    try:
        for name, switch in switches.items():
            llm = start_engine(model, [Example("", "", [0] * longest, None)], switch, **settings)
            started[name] = Engine(llm)
            started[name].count()
        yield started
    finally:
        for one in started.values():
            stop_engine(one.llm)
