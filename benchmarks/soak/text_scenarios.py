"""The scenario of `bench_texts.py`: a mix of everything, from one client and from many.

There is no single right text: a settled token exits only where that is faster, which depends on the
other requests in the batch. So the server itself judges each text afterwards, at full depth, as a
prompt with log-probabilities: every token of a full-depth text must be the server's choice, and in
texts with exits no more tokens may differ than the policy's bound allows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from benchmarks.soak.fault_scenarios import Stage, in_background, sampled_memory
from benchmarks.soak.load_client import Tokens
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.watch.units import Grouping
from vllm_adainfer.watch.watch import Watch

CLIENTS = (1, 6, 16)  # in turn: one client reaches code that many do not, and vice versa
TURN_SECONDS = 30
RELOAD_SECONDS = 20
SCRAPE_SECONDS = 0.1
LENGTHS = (32, 200)  # range of a text's tokens
TURN = 40  # tokens of the follow-up question
TIE = 0.5  # difference in log-probability that rounding may turn around
JUDGED = 400  # texts per scenario
GROWING = ("_total", "_count", "_bucket", "_sum")


@dataclass(frozen=True)
class Text:
    """A generated text.

    Attributes:
        kind: early, or deep (full depth).
        prompt: token ids of the prompt.
        tokens: token ids of the text.

    """

    kind: str
    prompt: list[int]
    tokens: Tokens


@dataclass
class Scraper:
    """Checks that no counter falls between two reads of `/metrics`.

    Attributes:
        scrapes: number of reads.
        fallen: how far counters fell, by series.

    """

    scrapes: int = 0
    fallen: dict[str, float] = field(default_factory=dict)
    _last: dict[str, float] = field(default_factory=dict)

    def read(self, text: str) -> None:
        """Compare a reply of ``/metrics`` with the previous one."""
        self.scrapes += 1
        for line in text.splitlines():
            if not line.startswith("adainfer:"):
                continue
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0].endswith(GROWING):
                if float(value) < self._last.get(series, 0):
                    self.fallen[series] = self._last[series] - float(value)
                self._last[series] = float(value)


@asynccontextmanager
async def scraping(stage: Stage) -> AsyncIterator[Scraper]:
    """Read `/metrics` every `SCRAPE_SECONDS` while the context lasts."""
    scraper = Scraper()

    async def scrape() -> None:
        async with one_connection_each(stage) as session:
            while True:
                async with session.get("/metrics") as response:
                    scraper.read(await response.text())
                await asyncio.sleep(SCRAPE_SECONDS)

    async with in_background(scrape()):
        yield scraper


def one_connection_each(stage: Stage) -> aiohttp.ClientSession:
    """A session with a new connection per request: a server may close an idle one."""
    connector = aiohttp.TCPConnector(force_close=True)
    return aiohttp.ClientSession(stage.server.url, connector=connector)


class Writers:
    """Clients that request texts, one request after the other."""

    def __init__(self, stage: Stage, prompts: list[list[int]], policy: str, leaves: bool) -> None:
        """With `leaves` some clients disconnect."""
        self.texts: list[Text] = []
        self.problems: list[str] = []
        self._stage = stage
        self._prompts = prompts
        self._policy = policy
        self._leaves = leaves

    async def act(self) -> None:
        """Send one request or, with a follow-up, two."""
        dice, client = self._stage.dice, self._stage.client
        chance = dice.random()
        if chance < 0.25:
            await client.ask(dice.randrange(len(client.questions)))
            return
        prompt = dice.choice(self._prompts)
        if self._leaves and chance < 0.45:
            body = self._body("early", prompt, 200, stream=True)
            await client.leave(body, dice.uniform(0.05, 6))
            return
        kind = dice.choice(["early", "early", "deep"])
        text = await self._write(kind, prompt, dice.randint(*LENGTHS))
        if text is not None and dice.random() < 0.3:
            question = dice.choice(self._prompts)[:TURN]
            await self._write(kind, [*prompt, *text, *question], LENGTHS[0])

    async def _write(self, kind: str, prompt: list[int], tokens: int) -> Tokens | None:
        client = self._stage.client
        client.tally.sent += 1
        reply = await client.send(self._body(kind, prompt, tokens, self._stage.dice.random() < 0.5))
        client.count(reply)
        if reply.status != 200:
            return None
        if len(reply.tokens) != tokens:
            self.problems.append(f"a text of {len(reply.tokens)} tokens, not {tokens}")
        self.texts.append(Text(kind, prompt, reply.tokens))
        return reply.tokens

    def _body(self, kind: str, prompt: list[int], tokens: int, stream: bool) -> dict[str, Any]:
        return {
            "model": "model",
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
            "vllm_xargs": {"adainfer": 0} if kind == "deep" else {"adainfer_policy": self._policy},
            "temperature": 0,
        }


async def texts(
    stage: Stage,
    seconds: float,
    prompts: list[list[int]],
    policy: str,
    config: ArtifactConfig,
    leaves: bool,
) -> dict[str, Any]:
    """Request texts (plain, streamed, follow-ups) and labels for `seconds`, with reloads."""
    writers = Writers(stage, prompts, policy, leaves)
    begin = time.monotonic()
    reloads: dict[int, int] = {}

    async def work(number: int) -> None:
        while (passed := time.monotonic() - begin) < seconds:
            if number < CLIENTS[int(passed / TURN_SECONDS) % len(CLIENTS)]:
                await writers.act()
            else:
                await asyncio.sleep(0.2)

    async def reload() -> None:
        async with one_connection_each(stage) as session:
            while time.monotonic() - begin < seconds:
                async with session.post("/adainfer/reload") as response:
                    reloads[response.status] = reloads.get(response.status, 0) + 1
                await asyncio.sleep(RELOAD_SECONDS)

    async with scraping(stage) as scraper, sampled_memory(stage) as samples:
        await asyncio.gather(reload(), *(work(number) for number in range(max(CLIENTS))))
    took = time.monotonic() - begin
    problems = writers.problems
    problems += [f"{series} fell by {amount:g}" for series, amount in scraper.fallen.items()]
    problems += [
        f"{count} reloads got HTTP {status}" for status, count in reloads.items() if status != 200
    ]
    judged = await judge(stage, writers.texts, config)
    if judged["deep"]["changed"]:
        problems.append(
            f"{judged['deep']['changed']} tokens at full depth are not the server's choice"
        )
    if judged["early"]["low"] > config.epsilon:
        problems.append(f"more tokens differ than {config.epsilon:g} allows: {judged['early']}")
    return {
        "texts": {
            kind: sum(text.kind == kind for text in writers.texts) for kind in ("early", "deep")
        },
        "text_tokens": sum(len(text.tokens) for text in writers.texts),
        "judged": judged,
        "shadow": {
            what: sum(stage.server.metrics(f"adainfer:shadow_{what}_total").values())
            for what in ("checked", "disagreed")
        },
        "scrapes": scraper.scrapes,
        "reloads": sum(reloads.values()),
        "took_seconds": took,
        "samples": samples,
        "problems": problems,
    }


async def judge(stage: Stage, written: list[Text], config: ArtifactConfig) -> dict[str, Any]:
    """Have the server rescore texts at full depth; counts tokens it would not choose, by kind.

    The interval for early texts is clustered by prompt, over the tokens the bound covers.
    """
    found: dict[str, dict[str, float]] = {
        kind: {"texts": 0, "tokens": 0, "changed": 0} for kind in ("early", "deep")
    }
    monitor = Watch([config.epsilon], config.delta, Grouping(config.max_tokens))
    to_judge = [text for text in written if text.kind in found]
    stage.dice.shuffle(to_judge)
    waiting = iter(enumerate(to_judge[:JUDGED]))

    async def work() -> None:
        for number, text in waiting:
            reply = await read_back(stage, text)
            changed = [behind > TIE for behind in reply]
            one = found[text.kind]
            one["texts"] += 1
            one["tokens"] += len(changed)
            one["changed"] += sum(changed)
            if text.kind == "early":
                names = [str(number)] * len(changed)
                monitor.observe(names, np.zeros(len(changed), dtype=np.int64), np.array(changed))
                monitor.ended(str(number))

    await asyncio.gather(*(work() for _ in range(4)))
    [reading] = monitor.readings()
    found["early"] |= {"low": reading.low, "high": reading.high}
    return found


async def read_back(stage: Stage, text: Text) -> list[float]:
    """For each token, how much log-probability the full model's best token has over it."""
    body = {
        "model": "model",
        "prompt": [*text.prompt, *text.tokens],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 1,
        "return_token_ids": True,
        "vllm_xargs": {"adainfer": 0},
    }
    stage.client.tally.sent += 1
    reply = await stage.client.send(body)
    stage.client.count(reply)
    places = reply.prompt_logprobs[len(text.prompt) :]
    return [_behind(place, token) for place, token in zip(places, text.tokens, strict=True)]


def _behind(place: Mapping[str, Mapping[str, float]], token: int) -> float:
    best = max(entry["logprob"] for entry in place.values())
    return best - place[str(token)]["logprob"]
