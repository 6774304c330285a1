"""Structured answers over HTTP: what clients of a server that drafts get, and what it counts.

The first request with a grammar is never drafted, so its answer is what later ones must be.
"""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from benchmarks.common.server import Server, serving
from tests.byte_model import save_byte_model
from tests.e2e.structured_bodies import (
    ANY_JSON,
    BODIES,
    CHAT,
    COMPLETIONS,
    FIELDS,
    RESPONSES,
    body_of,
    schema_of,
)
from tests.e2e.test_serve import environment, post, run, scraping
from tests.full import FULL_ON_V2, needed
from tests.in_docs import field_probabilities
from tests.waiting import wait_for

pytestmark = FULL_ON_V2

FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32",
    "--kv-cache-memory-bytes", str(64 << 20),
    "--max-num-batched-tokens", "256", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    "--chat-template", "{% for message in messages %}{{ message['content'] }}{% endfor %}",
)  # fmt: skip
DRAFTED, KEPT = "adainfer:structure_tokens_drafted_total", "adainfer:structure_tokens_kept_total"
TEXT = "a warm and clever film"
SHOWN = [
    *("openai, parse", "openai, a function", "openai, Responses", "instructor, JSON"),
    *("LangChain, function_calling", "pydantic-ai", "vLLM, regex", "vLLM, choice"),
    *("vLLM, grammar", "vLLM, json in completions"),
]
TEXTS = [TEXT, "the plot is slow", "never", "a dull film, but what a plot", "a film"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(str(model), {"draft_structure": True}, log, FLAGS, environment()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def total(server: Server, name: str) -> int:
    """A counter, of all grammars."""
    return int(sum(server.metrics(name + "{").values()))


def told(path: str, found: Any) -> Any:
    """What the model wrote in an answer, and why it ended.

    vLLM parses arguments and writes them again, unless they are streamed.
    """
    if path == RESPONSES:
        return [part["text"] for item in found["output"] for part in item["content"]]
    [choice] = found["choices"]
    if path == COMPLETIONS:
        return choice["text"], choice["finish_reason"]
    calls = [one["function"] for one in choice["message"].get("tool_calls") or ()]
    made = [(one["name"], json.loads(one["arguments"])) for one in calls]
    return choice["message"]["content"] or "", made, choice["finish_reason"]


def ask(server: Server, name: str, text: str = TEXT) -> Any:
    path, body = body_of(name, text)
    status, found = post(server, path, body)
    assert status == 200, found
    return told(path, found)


@pytest.mark.parametrize("name", needed(SHOWN, of=BODIES))
def test_each_client_gets_the_answer_that_no_draft_has_touched(server, name):
    before = total(server, DRAFTED)
    first = ask(server, name)
    drafted, kept = total(server, DRAFTED), total(server, KEPT)
    assert [ask(server, name) for _ in range(3)] == [first] * 3
    if name not in ANY_JSON:
        assert drafted == before
        wait_for(lambda: total(server, KEPT) > kept)


def put_together(path: str, events: Iterator[Any]) -> Any:
    """What a client has at the end of a stream, as `told`."""
    if path == RESPONSES:
        return ["".join(one.delta for one in events if one.type == "response.output_text.delta")]
    text, names, arguments, ended = "", list[str](), dict[int, str](), None
    for [choice] in (event.choices for event in events):
        ended = choice.finish_reason or ended
        delta = choice if path == COMPLETIONS else choice.delta
        text += (delta.text if path == COMPLETIONS else delta.content) or ""
        for call in getattr(delta, "tool_calls", None) or ():
            names += [call.function.name] if call.function.name else []
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    if path == COMPLETIONS:
        return text, ended
    calls = zip(names, arguments.values(), strict=True)
    return text, [(name, json.loads(one)) for name, one in calls], ended


@pytest.mark.parametrize(
    "name",
    needed(["openai, parse", "openai, a function", "vLLM, regex in completions"], of=BODIES),
)
def test_the_deltas_of_a_stream_make_up_the_answer(server, client, name):
    found = [ask(server, name) for _ in range(4)]
    path, body = body_of(name, TEXT, stream=True)
    create: Any = {
        CHAT: client.chat.completions.create,
        COMPLETIONS: client.completions.create,
        RESPONSES: client.responses.create,
    }[path]
    beyond = "structured_outputs"  # the client does not know it
    more = {beyond: body.pop(beyond)} if beyond in body else {}
    assert put_together(path, create(**body, extra_body=more)) == found[0]


def with_logprobs(client: OpenAI, schema: dict[str, Any]) -> Any:
    """An answer to a schema, with the best tokens at each place."""
    [choice] = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": TEXT}],
        temperature=0,
        max_tokens=240,
        logprobs=True,
        top_logprobs=20,
        response_format={"type": "json_schema", "json_schema": {"name": "R", "schema": schema}},
    ).choices
    return choice


def test_log_probabilities_are_among_the_allowed_tokens_drafted_or_not(server, client):
    schema = schema_of("log-probabilities")
    first, *later = (with_logprobs(client, schema) for _ in range(3))
    assert first.message.content == "".join(one.token for one in first.logprobs.content[:-1])
    expected = [
        [one.logprob, *(t.logprob for t in one.top_logprobs)] for one in first.logprobs.content
    ]
    for again in later:
        assert again.message.content == first.message.content
        found = [
            [one.logprob, *(t.logprob for t in one.top_logprobs)] for one in again.logprobs.content
        ]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-3, rtol=0)
    for one in first.logprobs.content:  # no place of this schema has more than 20 allowed tokens
        assert sum(math.exp(other.logprob) for other in one.top_logprobs) == pytest.approx(
            1, abs=1e-4
        )


def test_a_client_reads_the_probability_of_each_value_as_the_page_says(client):
    schema = schema_of("values")
    choice = [with_logprobs(client, schema) for _ in range(3)][-1]
    answer = json.loads(choice.message.content)
    found = field_probabilities(choice.logprobs.content, schema)
    assert found.keys() == FIELDS.keys()
    for name, shares in found.items():
        values = [str(one) for one in FIELDS[name].get("enum", ["false", "true"])]
        assert shares.keys() <= {*values}
        assert shares[str(answer[name]).lower()] > 0
        assert sum(shares.values()) <= 1 + 1e-4
    assert sum(found["negated"].values()) == pytest.approx(1, abs=1e-4)


def hang_up(server: Server, body: dict[str, Any]) -> None:
    """Ask for a stream, and leave after its first bytes."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps({**body, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert connection.recv(64).startswith(b"HTTP/1.1 200")


def test_a_busy_server_whose_clients_hang_up_gives_the_others_their_answers(server):
    names = ["openai, parse", "openai, a function", "vLLM, json", "vLLM, regex"]
    wanted = [(name, text) for name in names for text in TEXTS]
    alone = [ask(server, *one) for one in wanted]
    before = total(server, KEPT)
    with scraping(server) as scraped, ThreadPoolExecutor(12) as pool:
        left = [pool.submit(hang_up, server, body_of(name, text)[1]) for name, text in wanted]
        asked = [pool.submit(ask, server, *one) for one in 2 * wanted]
        assert [one.result() for one in asked] == 2 * alone
        for one in left:
            one.result()
    assert server.get("/health") == ""
    assert total(server, KEPT) > before
    for series in scraped[-1]:
        if series.partition("{")[0].endswith("_total"):
            values = [one.get(series, 0) for one in scraped]
            assert values == sorted(values), series
    running = server.metrics("vllm:num_requests_running{")
    wait_for(lambda: not sum(server.metrics("vllm:num_requests_running{").values()))
    assert running.keys() == server.metrics("vllm:num_requests_running{").keys()
    assert 0 < total(server, KEPT) <= total(server, DRAFTED)


BAD: dict[str, dict[str, Any]] = {
    "no schema": {"json": {"type": "nonsense"}},
    "a reference to nothing": {"json": {"$ref": "#/$defs/None"}},
    "half a regex": {"regex": "(a"},
    "half a grammar": {"grammar": "root ::= "},
    "no choice": {"choice": []},
    "two restrictions": {"regex": "a", "choice": ["a"]},
}


def refusal(server: Server, kind: str) -> tuple[int, str]:
    """What a server says of a bad schema; xgrammar begins with the time of day."""
    path, body = body_of("vLLM, json", TEXT, structured_outputs=BAD[kind])
    status, answer = post(server, path, body)
    return status, re.sub(r"\[\d\d:\d\d:\d\d\]", "", answer["error"]["message"])


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_schema_gets_a_400_each_time(server, kind):
    answers = [refusal(server, kind) for _ in range(3)]
    assert [status for status, _ in answers] == [400] * 3
    assert len(set(answers)) == 1
    assert server.get("/health") == ""


def test_the_log_says_that_answers_are_drafted_and_how_many_tokens_were_kept(server):
    for _ in range(3):
        ask(server, "openai, parse")
    line = re.compile(r"Engine 000: structured answers: (\d+) tokens drafted, (\d+) kept \(\d+%\)")
    drafted, kept = map(int, wait_for(lambda: line.search(server.log.read_text())).groups())
    assert kept <= drafted
    assert "AdaInfer drafts structured answers from earlier ones" in server.log.read_text()


@pytest.mark.full
def test_every_answer_and_every_refusal_is_a_stock_servers(server, model, tmp_path):
    def all_of(asked: Server) -> dict[str, Any]:
        answers = {name: [ask(asked, name, text) for text in TEXTS] for name in BODIES}
        return {**answers, **{kind: refusal(asked, kind) for kind in BAD}}

    for _ in range(2):
        ours = all_of(server)
    with serving(str(model), None, tmp_path / "log", FLAGS, environment()) as stock:
        assert ours == all_of(stock)


@pytest.mark.full
def test_run_batch_drafts_and_gives_the_same_answers(server, model, tmp_path):
    lines = []
    for number, text in enumerate(3 * TEXTS):
        url, body = body_of("openai, parse", text, model=str(model))
        line = {"custom_id": str(number), "method": "POST", "url": url, "body": body}
        lines.append(json.dumps(line))
    given, written = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(lines) + "\n")
    switch = json.dumps({"adainfer": {"draft_structure": True}})
    said = run(
        "run-batch", {}, "-i", str(given), "-o", str(written), "--model", str(model),
        "--additional-config", switch, *FLAGS,
    )  # fmt: skip
    assert "AdaInfer drafts structured answers" in said
    found = {}
    for line in map(json.loads, written.read_text().splitlines()):
        found[int(line["custom_id"])] = told(CHAT, line["response"]["body"])
    assert [found[place] for place in range(len(lines))] == [
        ask(server, "openai, parse", text) for text in 3 * TEXTS
    ]
