"""Requests of one kind: the first objects of a grammar, then rounds by the number in flight."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.offline.structured_engine import OURS, STOCK, Engine, Request, Sent
from benchmarks.offline.structured_requests import Body, read, with_new_grammar
from vllm_adainfer.offline.evaluation.rounds import in_rounds

OBJECTS = {1: 2, 4: 4, 16: 16, 64: 64}  # in a round, by the number in flight
MOST = max(OBJECTS)
FIRST, FIRST_IN_FLIGHT, FIRST_ROUNDS = 50, 16, 2
Runs = Mapping[str, Sequence[Mapping[int, Sent]]]  # by name, then in each round by the number


def of_kind(both: Mapping[str, Engine], bodies: Sequence[Body], rounds: int) -> dict[str, Any]:
    """All that is measured of requests with these bodies."""
    first = of_first(both, bodies)
    requests = read(bodies, both[STOCK].llm.get_tokenizer())
    number = dict.fromkeys(both, 0)

    def once(name: str) -> dict[int, Sent]:
        number[name] += 1
        return {
            in_flight: both[name].send(in_round(requests, number[name] - 1, count), in_flight)
            for in_flight, count in OBJECTS.items()
        }

    runs = in_rounds([STOCK, OURS], rounds, once)
    return {
        "first": first,
        "in_flight": [
            {"number": one, "objects": count}
            | {name: summed([run[one] for run in each]) for name, each in runs.items()}
            for one, count in OBJECTS.items()
        ],
        "texts": texts_of(runs, len(requests)),
    }


def of_first(both: Mapping[str, Engine], bodies: Sequence[Body]) -> dict[str, Any]:
    """The first objects of new grammars, which are compiled and learnt meanwhile.

    The last grammar is that of the rounds to come.
    """
    tokenizer = both[STOCK].llm.get_tokenizer()
    left = dict.fromkeys(both, FIRST_ROUNDS)

    def once(name: str) -> Sent:
        left[name] -= 1
        requests = read(with_new_grammar(bodies[:FIRST], left[name]), tokenizer)
        return both[name].send(requests, FIRST_IN_FLIGHT)

    runs = in_rounds([STOCK, OURS], FIRST_ROUNDS, once)
    return {"number": FIRST_IN_FLIGHT, "objects": FIRST} | {
        name: summed(each) for name, each in runs.items()
    }


def in_round(requests: Sequence[Request], number: int, count: int) -> list[Request]:
    """The requests of a round; after the last one comes the first again."""
    return [requests[place] for place in places(number, count, len(requests))]


def places(number: int, count: int, requests: int) -> list[int]:
    """Which requests these are."""
    return [place % requests for place in range(number * count, (number + 1) * count)]


def summed(runs: Sequence[Sent]) -> dict[str, Any]:
    """Seconds and median latency of each run, and the counts of all."""
    return {
        "seconds": [run.seconds for run in runs],
        "p50_ms": [1000 * statistics.median(run.latencies) for run in runs],
        "tokens": sum(run.tokens for run in runs),
        "steps": sum(run.counts.steps for run in runs),
        "rows": sum(run.counts.rows for run in runs),
        "drafted": sum(run.counts.drafted for run in runs),
        "kept": sum(run.counts.kept for run in runs),
    }


def texts_of(runs: Runs, requests: int) -> dict[str, int]:
    """How many texts are compared, and differ: ours and stock's with as many in flight, and stock's
    own with fewer and with the most in flight.
    """
    found = {"compared": 0, "differ": 0, "stock_compared": 0, "stock_differ": 0}
    numbered = enumerate(zip(runs[STOCK], runs[OURS], strict=True))
    most: dict[int, str] = {}
    for number, run in enumerate(runs[STOCK]):
        most.update(zip(places(number, OBJECTS[MOST], requests), run[MOST].texts, strict=True))
    for number, (stock, ours) in numbered:
        for in_flight, count in OBJECTS.items():
            texts = stock[in_flight].texts
            found["compared"] += count
            found["differ"] += differing(texts, ours[in_flight].texts)
            if in_flight != MOST:
                again = [most[place] for place in places(number, count, requests)]
                found["stock_compared"] += count
                found["stock_differ"] += differing(texts, again)
    return found


def differing(texts: Sequence[str], others: Sequence[str]) -> int:
    """At how many places two lists of texts differ."""
    return sum(text != other for text, other in zip(texts, others, strict=True))
