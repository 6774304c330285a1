"""Requests for a server, from one that knows what has to be answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from vllm_adainfer.offline.calibration.data import fill, read_rows
from vllm_adainfer.policy.artifact_files import load_artifact_config

SECONDS = 600.0  # an answer that takes longer is lost
TEXT = "text"
TEXT_TOKENS = 4
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A request that has one right answer.

    Attributes:
        kind: the policy that decides it, or `TEXT`.
        deep: whether it asks for full depth.
        body: of ``/v1/completions``.

    """

    kind: str
    deep: bool
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What came back: `status` is 0 where nothing did."""

    status: int
    tokens: Tokens = ()
    prompt_tokens: int = 0
    prompt_logprobs: Sequence[Any] = ()
    message: str = ""


@dataclass
class Tally:
    """What became of requests.

    Attributes:
        sent: all of them.
        answered: with the quiet pass's answer, or, where none is known, with any.
        ties: with another; but asked again, alone, the quiet pass's came.
        wrong: with another, and again when asked alone.
        refused: by a 4xx, as it was to be.
        lost: anything else, though nobody had killed the engine.
        failed: the same, in flight when the engine was killed.
        left: the client closed the connection before the end.
        errors: statuses or exceptions of those that were lost or failed.

    """

    sent: int = 0
    answered: int = 0
    ties: int = 0
    wrong: int = 0
    refused: int = 0
    lost: int = 0
    failed: int = 0
    left: int = 0
    errors: dict[str, int] = field(default_factory=dict)


def questions_of(name: str, artifact: Path, data: Path, template: str, rows: int) -> list[Question]:
    """The first rows of a task, each with exits, at full depth, and (some) as generated text."""
    labels = list(load_artifact_config(str(artifact)).label_ids)
    found = []
    for number, row in enumerate(read_rows(data)[:rows]):
        prompt = fill(template, row)
        body = {"model": "model", "prompt": prompt, "temperature": 0, "return_token_ids": True}
        one = {**body, "max_tokens": 1, "allowed_token_ids": labels}
        found.append(Question(name, False, one))
        found.append(Question(name, True, {**one, "vllm_xargs": {"adainfer": 0}}))
        if number % 10 == 0:
            found.append(Question(TEXT, True, {**body, "max_tokens": TEXT_TOKENS}))
    return found


class Client:
    """Sends requests and keeps count.

    Attributes:
        questions: that it may ask.
        tally: of what it has sent.
        doubtful: questions, by index, with another answer than in the quiet pass.
        killed: whether the engine is known to be dead.

    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        questions: Sequence[Question],
        expected: Mapping[int, Tokens],
    ) -> None:
        """`expected` are answers by the index of the question."""
        self.questions = questions
        self.tally = Tally()
        self.doubtful: list[int] = []
        self.killed = False
        self._session = session
        self._expected = expected

    async def send(self, body: Any) -> Reply:
        """One request, uncounted; `body` is JSON's, or bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post("/v1/completions", data=raw, headers=headers) as response:
                text = await response.text()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return Reply(0, message=type(error).__name__)
        if text.startswith("data:"):
            return streamed(text)
        try:
            told = json.loads(text)
        except ValueError:
            return Reply(response.status, message=text)
        if response.status != 200:
            told = told.get("error", told)
            return Reply(response.status, message=str(told.get("message", told)))
        [choice] = told["choices"]
        return Reply(
            200,
            tuple(choice["token_ids"]),
            told["usage"]["prompt_tokens"],
            choice.get("prompt_logprobs") or (),
        )

    async def ask(self, index: int) -> Reply:
        """Ask a question, and compare the answer."""
        self.tally.sent += 1
        reply = await self.send(self.questions[index].body)
        if reply.status == 200 and reply.tokens != self._expected[index]:
            self.doubtful.append(index)
        else:
            self.count(reply)
        return reply

    def count(self, reply: Reply, refusable: bool = False) -> None:
        """Count a reply that is not compared with anything.

        A refusal is as good as lost unless the request was made to be refused.
        """
        if reply.status == 200:
            self.tally.answered += 1
        elif refusable and 400 <= reply.status < 500:
            self.tally.refused += 1
        else:
            self.tally.failed += self.killed
            self.tally.lost += not self.killed
            what = f"HTTP {reply.status}" if reply.status else reply.message
            self.tally.errors[what] = self.tally.errors.get(what, 0) + 1

    async def leave(self, body: Mapping[str, Any], seconds: float) -> None:
        """Send one and close the connection after so many seconds, if it is still open."""
        self.tally.sent += 1
        try:
            self.count(await asyncio.wait_for(self.send(body), seconds))
        except asyncio.TimeoutError:
            self.tally.left += 1

    async def ask_all(self, order: Sequence[int], many: int) -> None:
        """Ask questions by their index, `many` at a time."""
        waiting = iter(order)

        async def work() -> None:
            for index in waiting:
                await self.ask(index)

        await asyncio.gather(*(work() for _ in range(many)))

    async def settle(self) -> None:
        """Ask again, alone, where another answer came than in the quiet pass."""
        for index in self.doubtful:
            same = (await self.send(self.questions[index].body)).tokens == self._expected[index]
            self.tally.ties += same
            self.tally.wrong += not same
        self.doubtful.clear()


def streamed(text: str) -> Reply:
    """A stream that has been read to its end, which is said in it."""
    *events, end = [line[len("data:") :].strip() for line in text.split("\n\n") if line.strip()]
    if end != "[DONE]":
        return Reply(0, message="a stream without an end")
    told = [json.loads(event) for event in events]
    if any("error" in one for one in told):
        return Reply(0, message="error in a stream")
    parts = [choice.get("token_ids") or () for one in told for choice in one["choices"]]
    return Reply(200, tuple(token for part in parts for token in part))


@asynccontextmanager
async def client_of(
    url: str, questions: Sequence[Question], expected: Mapping[int, Tokens]
) -> AsyncIterator[Client]:
    """A client for as long as asked; every request has a connection of its own."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield Client(session, questions, expected)


async def quiet_pass(url: str, questions: Sequence[Question]) -> tuple[dict[int, Tokens], int]:
    """What is answered to one request at a time, and the longest prompt."""
    expected = {}
    longest = 0
    async with client_of(url, questions, {}) as client:
        for index, question in enumerate(questions):
            reply = await client.send(question.body)
            if reply.status != 200:
                raise RuntimeError(f"the quiet pass was answered by {reply}")
            expected[index] = reply.tokens
            longest = max(longest, reply.prompt_tokens)
    return expected, longest
