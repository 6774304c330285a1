"""A client that sends requests, knows the right answers and counts outcomes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.soak.soak_verdict import Wait
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.offline.calibration.data.examples import fill, read_rows

SECONDS = 600.0  # an answer that takes longer counts as lost
TEXT = "text"
TEXT_TOKENS = 4
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A request with one right answer, to the policy `kind` or `TEXT`, and maybe for full depth."""

    kind: str
    deep: bool
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """A server's reply; the status is 0 if there was none."""

    status: int
    tokens: Tokens = ()
    prompt_tokens: int = 0
    prompt_logprobs: Sequence[Any] = ()
    message: str = ""


@dataclass
class Tally:
    """Counts of requests by outcome.

    Attributes:
        answered: answered as in the quiet pass, or at all if that has no answer.
        ties: answered differently, but as in the quiet pass when sent again on its own.
        wrong: answered differently, also when sent again on its own.
        refused: refused with a 4xx, as expected.
        lost: any other outcome.
        left: the client closed the connection before the end.
        errors: counts by status or exception (lost) or by kind of question (wrong).

    """

    sent: int = 0
    answered: int = 0
    ties: int = 0
    wrong: int = 0
    refused: int = 0
    lost: int = 0
    left: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def add_error(self, what: str) -> None:
        """Count an error."""
        self.errors[what] = self.errors.get(what, 0) + 1


def questions_of(name: str, artifact: Path, data: Path, template: str, rows: int) -> list[Question]:
    """Questions from a task's first rows: with exits, at full depth, and some as generated text."""
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
    """Sends requests and counts their outcomes.

    Right answers are by the question's index; `doubtful` are the indices of questions that were
    answered differently than in the quiet pass.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        questions: Sequence[Question],
        expected: Mapping[int, Tokens],
    ) -> None:
        """Take the session to send with, the questions, and their right answers."""
        self.questions = questions
        self.tally = Tally()
        self.doubtful: list[int] = []
        self.waits: list[Wait] = []
        self._session = session
        self.expected = expected

    async def send(self, body: Any, more: Mapping[str, str] | None = None) -> Reply:
        """Send a request without counting it; `body` is JSON data or bytes, `more` are headers."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(more or {})}
        try:
            async with self._session.post("/v1/completions", data=raw, headers=headers) as response:
                text = await response.text()
        except (TimeoutError, aiohttp.ClientError) as error:
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

    async def ask(self, index: int) -> None:
        """Ask a question, and compare the answer."""
        self.tally.sent += 1
        question, asked = self.questions[index], time.monotonic()
        reply = await self.send(question.body)
        self.waits.append(Wait(question.kind, asked, time.monotonic() - asked))
        if reply.status == 200 and reply.tokens != self.expected[index]:
            self.doubtful.append(index)
        else:
            self.count(reply)

    def count(self, reply: Reply, refusable: bool = False) -> None:
        """Count a reply without comparing its answer.

        A refusal counts as lost unless the request is `refusable`.
        """
        if reply.status == 200:
            self.tally.answered += 1
        elif refusable and 400 <= reply.status < 500:
            self.tally.refused += 1
        else:
            self.tally.lost += 1
            what = f"HTTP {reply.status}" if reply.status else reply.message
            self.tally.add_error(what)

    async def leave(self, body: Mapping[str, Any], seconds: float) -> None:
        """Send a request, and disconnect after `seconds` if it is not answered by then."""
        self.tally.sent += 1
        try:
            self.count(await asyncio.wait_for(self.send(body), seconds))
        except TimeoutError:
            self.tally.left += 1

    async def settle(self) -> None:
        """Ask doubtful questions again, one at a time."""
        for index in self.doubtful:
            self.judge(index, await self.send(self.questions[index].body))
        self.doubtful.clear()

    def judge(self, index: int, again: Reply) -> None:
        """Count a doubtful question by the answer it got `again`, on its own."""
        if again.tokens == self.expected[index]:
            self.tally.ties += 1
        else:
            self.tally.wrong += 1
            self.tally.add_error(f"wrong answer to {self.questions[index].kind}")


def streamed(text: str) -> Reply:
    """The reply in the text of a stream, which must end with its end marker."""
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
    url: str,
    questions: Sequence[Question],
    expected: Mapping[int, Tokens],
    seconds: float = SECONDS,
) -> AsyncIterator[Client]:
    """A client that waits `seconds` for an answer; each request has its own connection."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield Client(session, questions, expected)


async def quiet_pass(url: str, questions: Sequence[Question]) -> tuple[dict[int, Tokens], int]:
    """The answers when one question is asked at a time, and the tokens of the longest prompt."""
    expected = {}
    longest = 0
    async with client_of(url, questions, {}) as client:
        for index, question in enumerate(questions):
            reply = await client.send(question.body)
            if reply.status != 200:
                raise RuntimeError(f"a request of the quiet pass failed: {reply}")
            expected[index] = reply.tokens
            longest = max(longest, reply.prompt_tokens)
    return expected, longest
