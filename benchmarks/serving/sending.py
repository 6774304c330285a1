"""Send requests at given times; collect the answers and their latencies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from benchmarks.common.server import Server, let_others_rest

SECONDS = 600


@dataclass(frozen=True)
class Sent:
    """The JSON replies of requests, in their order, their seconds, and those until all had come."""

    answers: list[dict[str, Any]]
    latencies: list[float]
    seconds: float

    def latency(self, quantile: float) -> float:
        """A quantile of the latencies, in milliseconds."""
        return 1000 * float(np.quantile(self.latencies, quantile))


def send(
    server: Server,
    path: str | Sequence[str],
    bodies: Sequence[Mapping[str, Any]],
    gaps: Sequence[float] | None = None,
    at_once: int | None = None,
) -> Sent:
    """Send requests all at once, or waiting ``gaps[n]`` seconds before the n-th.

    `path` is that of all, or of each; at most `at_once` are in flight, by default any number.

    A RuntimeError if a request failed.
    """
    let_others_rest()
    paths = [path] * len(bodies) if isinstance(path, str) else path
    return asyncio.run(_send(server, paths, bodies, gaps or [0.0] * len(bodies), at_once))


def text_of(answer: Mapping[str, Any]) -> str:
    """The text of a completion or of a chat."""
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


async def _send(
    server: Server,
    paths: Sequence[str],
    bodies: Sequence[Mapping[str, Any]],
    gaps: Sequence[float],
    at_once: int | None,
) -> Sent:
    room = asyncio.Semaphore(at_once or len(bodies))
    async with aiohttp.ClientSession(
        server.url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=SECONDS),
        raise_for_status=True,
    ) as session:

        async def one(path: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
            async with room:
                start = time.perf_counter()
                async with session.post(path, json=body) as response:
                    answer: dict[str, Any] = await response.json()
                return answer, time.perf_counter() - start

        start = time.perf_counter()
        try:
            sent = []
            for path, body, gap in zip(paths, bodies, gaps, strict=True):
                await asyncio.sleep(gap)
                sent.append(asyncio.create_task(one(path, body)))
            done = await asyncio.gather(*sent)
        except aiohttp.ClientError as error:
            raise RuntimeError(f"a request failed: {error}") from error
        seconds = time.perf_counter() - start
    return Sent([answer for answer, _ in done], [latency for _, latency in done], seconds)
