"""What a step costs with drafts that are all refused, beside one without drafts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks.offline.structured_engine import Engine, Request
from vllm_adainfer.drafts.answers import Answers
from vllm_adainfer.drafts.grammars import Grammar
from vllm_adainfer.offline.evaluation.rounds import in_rounds

UNLIKELY = "'"  # a token that the model hardly ever writes
REFUSED = (0, 1, 4, 16)  # rows of each request
IN_FLIGHT = (1, 16)
ROUNDS, STEPS = 4, 12


@contextmanager
def drafting(token: int, count: int) -> Iterator[None]:
    """Draft `token` so many times in each step, and never learn that it was refused."""

    def draft(self: Answers, before: Any, least: float, longest: int, end: int) -> list[int]:
        return [token] * min(count, longest)

    with (
        mock.patch.object(Answers, "draft", draft),
        mock.patch.object(Grammar, "judge"),
    ):
        yield


def refusals(engine: Engine, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Median milliseconds of a step, by requests in it and by refused rows of each.

    `UNLIKELY` must be legal everywhere under the grammar of `requests`, which came before.
    """
    [token] = engine.llm.get_tokenizer().encode(UNLIKELY, add_special_tokens=False)
    found = []
    for in_flight in IN_FLIGHT:

        def once(count: str, in_flight: int = in_flight) -> dict[str, Any]:
            with drafting(token, int(count)):
                return _steps(engine, requests[:in_flight])

        runs = in_rounds([str(count) for count in REFUSED], ROUNDS, once, f"{in_flight} refused")
        for count, each in runs.items():
            found.append(
                {
                    "in_flight": in_flight,
                    "refused": int(count),
                    "milliseconds": statistics.median(run["milliseconds"] for run in each),
                    "drafted": sum(run["drafted"] for run in each),
                    "kept": sum(run["kept"] for run in each),
                }
            )
    return found


def _steps(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    core, names = engine.llm.llm_engine, [engine.add(request) for request in requests]
    before = engine.counts.steps
    while engine.counts.steps < before + 2:  # the prompts' own, and one that warms up
        core.step()
    drafted, kept, seconds = engine.counts.drafted, engine.counts.kept, []
    for _ in range(STEPS):
        start = time.perf_counter()
        core.step()
        seconds.append(time.perf_counter() - start)
    core.abort_request(names)
    while core.has_unfinished_requests():
        core.step()
    return {
        "milliseconds": 1000 * statistics.median(seconds),
        "drafted": engine.counts.drafted - drafted,
        "kept": engine.counts.kept - kept,
    }
