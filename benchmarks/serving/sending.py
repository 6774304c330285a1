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
    """The outcome of a run.

    Attributes:
        answers: JSON replies, in the order the requests were sent.
        latencies: seconds per request, in the same order.
        seconds: time until all requests were answered.

    """

    answers: list[dict[str, Any]]
    latencies: list[float]
    seconds: float

    def latency(self, quantile: float) -> float:
        """A quantile of the latencies, in milliseconds."""
        return 1000 * float(np.quantile(self.latencies, quantile))


def send(
    server: Server,
    path: str,
    bodies: Sequence[Mapping[str, Any]],
    gaps: Sequence[float] | None = None,
) -> Sent:
    """Send `bodies`, waiting ``gaps[n]`` seconds before the n-th; None waits for each answer.

    Raises:
        RuntimeError: a request failed.

    """
    let_others_rest()
    return asyncio.run(_send(server, path, bodies, gaps))


def session_of(server: Server) -> aiohttp.ClientSession:
    """A client of `server` that sends any number of requests at once, and raises if one fails."""
    return aiohttp.ClientSession(
        server.url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=SECONDS),
        raise_for_status=True,
    )


async def _send(
    server: Server,
    path: str,
    bodies: Sequence[Mapping[str, Any]],
    gaps: Sequence[float] | None,
) -> Sent:
    async with session_of(server) as session:

        async def one(body: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
            start = time.perf_counter()
            async with session.post(path, json=body) as response:
                answer: dict[str, Any] = await response.json()
            return answer, time.perf_counter() - start

        start = time.perf_counter()
        try:
            if gaps is None:
                done = [await one(body) for body in bodies]
            else:
                sent = []
                for body, gap in zip(bodies, gaps, strict=True):
                    await asyncio.sleep(gap)
                    sent.append(asyncio.create_task(one(body)))
                done = await asyncio.gather(*sent)
        except aiohttp.ClientError as error:
            raise RuntimeError(f"a request failed: {error}") from error
        seconds = time.perf_counter() - start
    return Sent([answer for answer, _ in done], [latency for _, latency in done], seconds)
