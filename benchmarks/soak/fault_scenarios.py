"""The scenarios of `bench_faults.py`: each returns its part of the report's row."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.common.server import Server
from benchmarks.soak.fault_measures import memory
from benchmarks.soak.hostile_requests import cheap_refused, hostile
from benchmarks.soak.load_client import Client

BURST = 1000
STREAMS, ONE_TOKEN = 300, 200  # requests whose clients disconnect
RELOADS = 5
AT_ONCE = 16  # clients in a closed loop
STREAM = {"max_tokens": 64, "stream": True}
KILL_SECONDS = 120
RELOAD = "/adainfer/reload"
ORPHAN_SECONDS = 30
SAMPLE_SECONDS = 30


@dataclass
class Stage:
    """What a scenario works with.

    Attributes:
        server: a healthy server.
        client: client that sends requests and counts the replies.
        artifact: directory of a policy the server reads, a copy that may be damaged.
        dice: seeded random generator.

    """

    server: Server
    client: Client
    artifact: Path
    dice: random.Random

    def order(self, many: int) -> list[int]:
        """`many` indices of questions in random order, each about equally often."""
        indices = [number % len(self.client.questions) for number in range(many)]
        self.dice.shuffle(indices)
        return indices

    def to_leave(self, index: int, stream: bool) -> dict[str, Any]:
        """The body of a question, for a client that disconnects before the end."""
        body = dict(self.client.questions[index].body)
        if stream:
            body.pop("allowed_token_ids", None)
            body |= STREAM
        return body


@asynccontextmanager
async def traffic(stage: Stage, many: int = AT_ONCE) -> AsyncIterator[None]:
    """Send questions without a pause, `many` at a time, while the context lasts."""
    over = asyncio.Event()

    async def work() -> None:
        while not over.is_set():
            reply = await stage.client.ask(stage.dice.randrange(len(stage.client.questions)))
            if stage.client.killed and reply.status != 200:
                return

    workers = [asyncio.create_task(work()) for _ in range(many)]
    try:
        yield
    finally:
        over.set()
        await asyncio.gather(*workers)


async def everything(stage: Stage) -> dict[str, Any]:
    """Ask each question once."""
    await stage.client.ask_all(stage.order(len(stage.client.questions)), AT_ONCE)
    return {}


async def burst(stage: Stage) -> dict[str, Any]:
    """Send `BURST` requests at once, each on its own connection."""
    begin = time.monotonic()
    await stage.client.ask_all(stage.order(BURST), BURST)
    return {"requests_per_second": BURST / (time.monotonic() - begin)}


async def disconnects(stage: Stage) -> dict[str, Any]:
    """Clients disconnect before and after the first token, while others stay."""
    tasks = []
    for number, index in enumerate(stage.order(STREAMS + ONE_TOKEN)):
        stream = number < STREAMS
        seconds = stage.dice.uniform(0.01, 8 if stream else 2)
        tasks.append(stage.client.leave(stage.to_leave(index, stream), seconds))
    async with traffic(stage, 4):
        await asyncio.gather(*tasks)
    for _ in range(60):
        found = stage.server.metrics("vllm:num_requests_running")
        found |= stage.server.metrics("vllm:num_requests_waiting{")
        found |= stage.server.metrics("vllm:kv_cache_usage_perc")
        if not any(found.values()):
            break
        await asyncio.sleep(1)
    problems = [
        f"{series} is {value:g} after all clients have left"
        for series, value in found.items()
        if value
    ]
    await everything(stage)
    return {"problems": problems}


async def hostile_requests(stage: Stage) -> dict[str, Any]:
    """Send one hostile request after another, while good ones are answered."""
    replies, problems = {}, []
    body = next(one.body for one in stage.client.questions if not one.deep)
    async with traffic(stage, 4):
        for name, bad, statuses in hostile(body):
            stage.client.tally.sent += 1
            reply = await stage.client.send(bad)
            if reply.status in statuses and reply.status >= 500:
                stage.client.tally.refused += 1  # vLLM has no better status for it
            else:
                stage.client.count(reply, refusable=True)
            replies[name] = {"status": reply.status, "message": reply.message[:300]}
            if reply.status not in statuses:
                problems.append(f"{name}: {reply.status}, not {statuses}: {reply.message[:200]}")
            if len(reply.message) > 2000 or "Traceback" in reply.message:
                problems.append(f"{name}: {len(reply.message)} characters instead of a sentence")
    await everything(stage)
    return {"replies": replies, "problems": problems}


async def reload(stage: Stage) -> dict[str, Any]:
    """Reload under load: unchanged, with one artifact damaged in three ways, and repaired."""
    replies: list[dict[str, Any]] = []
    problems = []
    tensors, config = stage.artifact / "policy.safetensors", stage.artifact / "config.json"
    spare = stage.artifact.with_name(stage.artifact.name + "-spare")
    shutil.copytree(stage.artifact, spare)

    def cut() -> None:
        tensors.write_bytes(tensors.read_bytes()[:-1000])

    def no_json() -> None:
        config.write_text(config.read_text()[:-100])

    plans: list[tuple[str, Any, int]] = [("as it is", None, 200)] * RELOADS
    plans += [
        ("tensors cut", cut, 409),
        ("tensors gone", tensors.unlink, 409),
        ("no JSON", no_json, 409),
    ]
    async with traffic(stage), aiohttp.ClientSession(stage.server.url) as session:
        for what, damage, wanted in [*plans, ("mended", None, 200)]:
            if damage is not None:
                damage()
            async with session.post(RELOAD) as response:
                told = (await response.text()).replace(str(stage.artifact.parent), "DIR")
                status = response.status
            replies.append({"artifact": what, "status": status, "answer": told[:300]})
            if status != wanted:
                problems.append(f"reload, {what}: {status}, not {wanted}: {told[:200]}")
            await asyncio.sleep(1)
            if damage is not None:
                shutil.copytree(spare, stage.artifact, dirs_exist_ok=True)
    await everything(stage)
    return {"reloads": replies, "problems": problems}


async def soak(stage: Stage, seconds: float) -> dict[str, Any]:
    """Send a mix of everything in a closed loop, and sample memory every half minute."""
    refused = cheap_refused(next(one.body for one in stage.client.questions if not one.deep))
    problems: list[str] = []
    end = time.monotonic() + seconds

    async def work() -> None:
        while time.monotonic() < end:
            index = stage.dice.randrange(len(stage.client.questions))
            chance = stage.dice.random()
            if chance < 0.04:
                body = stage.to_leave(index, stage.dice.random() < 0.5)
                await stage.client.leave(body, stage.dice.uniform(0.01, 2))
            elif chance < 0.07:
                stage.client.tally.sent += 1
                reply = await stage.client.send(stage.dice.choice(refused))
                stage.client.count(reply, refusable=True)
                if reply.status == 200:
                    problems.append("a request that should be refused was answered")
            else:
                await stage.client.ask(index)

    begin = time.monotonic()
    async with sampled_memory(stage) as samples:
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    sent, took = stage.client.tally.sent, time.monotonic() - begin
    return {
        "samples": samples,
        "requests_per_second": sent / took,
        "hours_at_5_a_second": sent / 5 / 3600,
        "problems": problems,
    }


@asynccontextmanager
async def sampled_memory(stage: Stage) -> AsyncIterator[list[dict[str, float]]]:
    """Sample the server's memory every half minute, and once when the context ends."""
    begin = time.monotonic()
    samples: list[dict[str, float]] = []

    async def sample() -> None:
        held = await asyncio.to_thread(memory, stage.server)
        sent = stage.client.tally.sent
        samples.append({"seconds": time.monotonic() - begin, "sent": sent, **held})

    async def sample_now_and_then() -> None:
        while True:
            await sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async with in_background(sample_now_and_then()):
        yield samples
    await sample()


@asynccontextmanager
async def in_background(endless: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `endless` while the context lasts; raises its error at the end."""
    task = asyncio.create_task(endless)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def kill(stage: Stage, title: str) -> dict[str, Any]:
    """``kill -9`` one of the server's processes under load, and watch the others end."""
    server = stage.server
    family = psutil.Process(server.process.pid).children(recursive=True)
    [victim] = [one for one in family if one.cmdline()[:1] == [title]]
    health = "no answer"
    async with traffic(stage):
        await asyncio.sleep(5)
        killed = time.monotonic()
        stage.client.killed = True
        victim.kill()
        async with aiohttp.ClientSession(server.url) as session:
            while server.process.poll() is None and time.monotonic() < killed + KILL_SECONDS:
                with suppress(aiohttp.ClientError):
                    async with session.get("/health") as response:
                        if response.status != 200:
                            health = f"HTTP {response.status}"
                await asyncio.sleep(0.1)
        ended = time.monotonic() - killed
    problems = []
    if server.process.poll() is None:
        problems.append(f"the server has not ended {KILL_SECONDS} s after its {title} was killed")
    orphans = family
    while orphans and time.monotonic() < killed + ended + ORPHAN_SECONDS:
        await asyncio.sleep(0.5)
        orphans = [one for one in family if lives(one)]
    gone = time.monotonic() - killed
    return {
        "killed": title,
        "health_meanwhile": health,
        "server_ended_after_seconds": ended,
        "exit_code": server.process.returncode,
        "all_ended_after_seconds": None if orphans else gone,
        "left_behind": [one.pid for one in orphans],
        "problems": problems,
        "killed_at": killed,
    }


def lives(process: psutil.Process) -> bool:
    """Whether a process is running and not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
