"""Everything a client controls, in four sizes, sent by a hostile client next to good ones.

`bench_hostile_growth.py` measures it; `bench_everything.py` sends the same requests in its mix.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.common.server import Server
from benchmarks.soak.load_client import Client
from benchmarks.soak.measures import totals

PATH = "/v1/completions"
CLIENTS = 8  # good clients, each in a closed loop
FACTORS = (1, 10, 100, 1000)
DIFFERENT = 64  # distinct requests per thing and size, so that caches do not serve them
DEADLINE = 60.0  # seconds after which the hostile client gives up a request
RECOVERY = 120.0  # seconds within which the server must be idle again
PROMPT = "Review: a fine film\nSentiment:"
COMMENT = '\\"'  # escaped quotes: a search for texts in a grammar starts at each of them


@dataclass(frozen=True)
class Thing:
    """A part of a request that grows from its smallest size.

    `body` and `headers` make its parts from a size and a number that tells requests apart.
    """

    title: str
    base: int
    body: Callable[[int, int], dict[str, Any]] = lambda size, number: {}
    headers: Callable[[int, int], dict[str, str]] = lambda size, number: {}

    def request(self, size: int, number: int) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the request with this size and number."""
        body = {"model": "model", "prompt": PROMPT, "temperature": 0, "max_tokens": 4}
        body |= {"return_token_ids": True, **self.body(size, number)}
        headers = {"Content-Type": "application/json", **self.headers(size, number)}
        return json.dumps(body).encode(), headers


def structured(**outputs: Any) -> dict[str, Any]:
    """The structured outputs of a request."""
    return {"structured_outputs": outputs}


def grammar(size: int, number: int) -> dict[str, Any]:
    """A grammar of `size` characters."""
    words = [f'"n{number} {place:06}" "."' for place in range(max(size // 20, 1))]
    return structured(grammar="root ::= " + " | ".join(words))


def json_output(size: int, number: int) -> dict[str, Any]:
    """A JSON list that cannot end before `size` tokens are generated."""
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": size, "title": f"{number}"}
    return {"max_tokens": size, **structured(json=schema)}


def stops(size: int, number: int, characters: int = 0) -> dict[str, Any]:
    """So many stop strings, of so many characters each."""
    texts = [f"n{number} {place}".ljust(characters, "x") for place in range(size)]
    return {"max_tokens": 8, "stop": texts}


MOST_STOPS = 4  # as vLLM takes (``VLLM_MAX_STOP_STRINGS``)
THINGS = (
    Thing("grammar, characters", 100, grammar),
    Thing(
        "comment in a grammar, characters",
        64,
        lambda size, n: structured(
            grammar=f'root ::= "a" # {n} "' + COMMENT * (size // len(COMMENT))
        ),
    ),
    Thing(
        "choices", 10, lambda size, n: structured(choice=[f"n{n} {place}" for place in range(size)])
    ),
    Thing(
        "a choice, characters",
        100,
        lambda size, n: structured(choice=[f"n{n} " + "word " * (size // 5), f"n{n}"]),
    ),
    Thing("`allowed_token_ids`", 40, lambda size, n: {"allowed_token_ids": [*range(n, n + size)]}),
    Thing(
        "`logprob_token_ids`",
        12,
        lambda size, n: {"logprob_token_ids": [*range(n, n + size)], "logprobs": size},
    ),
    Thing("JSON output, tokens", 1, json_output),
    Thing("`stop` strings, number", 1, stops),
    Thing("`stop` strings, characters", 16, lambda size, n: stops(MOST_STOPS, n, size)),
    Thing(
        "header `X-Request-Id`, characters",
        64,
        headers=lambda size, n: {"X-Request-Id": f"{n}-".ljust(size, "x")},
    ),
    Thing("headers", 4, headers=lambda size, n: {f"X-{place}": f"{n}" for place in range(size)}),
)


async def growth(
    server: Server, client: Client, thing: Thing, factor: int, seconds: float
) -> dict[str, Any]:
    """The latency of good clients while a hostile one sends a thing in one size."""
    size = thing.base * factor
    requests = [thing.request(size, number) for number in range(DIFFERENT)]
    latencies, sent = await latencies_during(client, hostile(server.url, requests, seconds))
    return {"size": size, **summary(latencies), **sent}


async def quiet(client: Client, seconds: float) -> dict[str, Any]:
    """The latency of good clients on their own."""
    latencies, _ = await latencies_during(client, asyncio.sleep(seconds))
    return summary(latencies)


def summary(latencies: Sequence[float]) -> dict[str, float]:
    """Worst and median of `latencies` (seconds), in milliseconds, and their number."""
    return {
        "worst_ms": 1000 * max(latencies),
        "median_ms": 1000 * statistics.median(latencies),
        "answers": len(latencies),
    }


async def latencies_during(client: Client, other: Any) -> tuple[list[float], Any]:
    """The seconds each good request took while `other` ran, and the result of `other`."""
    latencies: list[float] = []
    over = asyncio.Event()
    dice = random.Random(0)

    async def work() -> None:
        while not over.is_set():
            begin = time.perf_counter()
            await client.ask(dice.randrange(len(client.questions)))
            latencies.append(time.perf_counter() - begin)

    workers = [asyncio.create_task(work()) for _ in range(CLIENTS)]
    try:
        result = await other
    finally:
        over.set()
        await asyncio.gather(*workers)
    return latencies, result


async def hostile(
    url: str, requests: Sequence[tuple[bytes, dict[str, str]]], seconds: float
) -> dict[str, Any]:
    """Send one request after another for `seconds`, at least one; returns their outcomes."""
    ends: Counter[str] = Counter()
    longest = 0.0
    message = ""
    timeout = aiohttp.ClientTimeout(total=DEADLINE)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        begin = time.monotonic()
        while not ends or time.monotonic() < begin + seconds:
            body, headers = requests[ends.total() % len(requests)]
            start = time.monotonic()
            try:
                async with session.post(PATH, data=body, headers=headers) as response:
                    text = await response.read()
                ends[f"HTTP {response.status}"] += 1
                if response.status != 200:
                    message = text[:200].decode(errors="replace")
            except TimeoutError:
                ends[f"no answer in {DEADLINE:.0f} s"] += 1
            except aiohttp.ClientError as error:
                ends[type(error).__name__] += 1
            longest = max(longest, time.monotonic() - start)
    return {"hostile": dict(ends), "hostile_longest_seconds": longest, "message": message}


async def recovers(server: Server) -> bool:
    """Whether the server is idle within `RECOVERY` seconds."""
    end = time.monotonic() + RECOVERY
    while time.monotonic() < end:
        with suppress(OSError):  # too busy to answer
            found = await asyncio.to_thread(totals, server)
            if not found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]:
                return True
        await asyncio.sleep(0.2)
    return False
