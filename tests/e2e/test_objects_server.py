"""Objects over HTTP: which requests get early ones, and what is left of clients that hang up."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from openai import OpenAI

from benchmarks.common.server import Server, serving
from tests.byte_model import byte_tokenizer, save_byte_model
from tests.e2e.objects import SCHEMA, VALUES, save_policy
from tests.e2e.structured_bodies import CHAT, COMPLETIONS, RESPONSES, forced, in_format, tool
from tests.e2e.test_serve import by_policy, environment, post
from tests.e2e.test_structured_server import FLAGS, hang_up
from tests.in_docs import code_of, field_probabilities
from tests.waiting import wait_for
from vllm_adainfer.settings.engine import NO_POLICY

pytestmark = pytest.mark.full

# The way in which a function's arguments are restricted to their schema, see `docs/structured.md`.
PLAIN_TOOLS = {"VLLM_ENFORCE_STRICT_TOOL_CALLING": "0"}
TEXTS = ["a warm and clever film", "the plot is slow", "never", "a film", "what a plot, no film"]
FORMAT: dict[str, Any] = {"type": "json_schema", "name": "Review", "schema": SCHEMA}
EARLY: dict[str, tuple[str, dict[str, Any]]] = {
    "response_format": (CHAT, in_format(SCHEMA, strict=True)),
    "response_format, not strict": (CHAT, in_format(SCHEMA)),
    "another description": (CHAT, in_format({**SCHEMA, "description": "Of a film."})),
    "structured_outputs": (CHAT, {"structured_outputs": {"json": SCHEMA}}),
    "a text": (CHAT, {"structured_outputs": {"json": json.dumps(SCHEMA, indent=2)}}),
    "a seed": (CHAT, {**in_format(SCHEMA), "seed": 7, "top_p": 0.5, "user": "u"}),
    "log-probabilities": (CHAT, {**in_format(SCHEMA), "logprobs": True, "top_logprobs": 3}),
    "completions": (COMPLETIONS, {"structured_outputs": {"json": SCHEMA}}),
    "completions, log-probabilities": (COMPLETIONS, {**in_format(SCHEMA), "logprobs": 3}),
    "completions, response_format": (COMPLETIONS, in_format(SCHEMA)),
    "Responses": (RESPONSES, {"text": {"format": {**FORMAT, "strict": True}}}),
    "a function": (CHAT, forced("note", SCHEMA)),
}
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "opted out": (CHAT, {**in_format(SCHEMA), "vllm_xargs": {"adainfer": 0}}),
    "sampled": (CHAT, {**in_format(SCHEMA), "temperature": 1.0, "n": 2, "seed": 1}),
    "stop": (CHAT, {**in_format(SCHEMA), "stop": ["zzz"]}),
    "a penalty": (CHAT, {**in_format(SCHEMA), "frequency_penalty": 0.1}),
    "any function": (CHAT, {"tools": [tool("note", SCHEMA)], "tool_choice": "required"}),
    "too short": (CHAT, {**in_format(SCHEMA), "max_tokens": 20}),
}
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}
HOSTILE: dict[str, dict[str, Any]] = {
    "large": {**SCHEMA, "description": "x" * (1 << 17)},
    "deep": DEEP,
    "recursive": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "odd names": {"properties": {one: {"const": 1} for one in ["", '"', "\\", "\x00", "a.b", "é"]}},
    "a wide range": {"type": "integer", "minimum": 0, "maximum": 10**6},
    "exploding": {
        "$ref": "#/$defs/n0",
        "$defs": {
            f"n{place}": {
                "type": "object",
                "properties": {one: {"$ref": f"#/$defs/n{place + 1}"} for one in "ab"},
            }
            for place in range(24)
        }
        | {"n24": {"type": "boolean"}},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """Of a policy that is sure of every object, and promises probabilities."""
    folder = tmp_path_factory.mktemp("served")
    model = save_byte_model(folder / "model")
    thresholds = torch.full((2, 3), -1.0)
    promise = {"risk": "probability", "tolerance": 0.2}
    # As FLAGS ask, without white space.
    policy: Path = save_policy(model, folder / "policy", thresholds, space="", **promise)
    switch = {"artifact": str(policy), "min_rows_saved": 1}
    set_up = environment(**PLAIN_TOOLS)
    with serving(str(model), switch, folder / "server.log", FLAGS, set_up) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def body(path: str, asked: dict[str, Any], text: str = TEXTS[0]) -> dict[str, Any]:
    message = [{"role": "user", "content": text}]
    said: dict[str, Any] = {
        CHAT: {"messages": message, "max_tokens": 120},
        COMPLETIONS: {"prompt": text, "max_tokens": 120},
        RESPONSES: {"input": message, "max_output_tokens": 120},
    }[path]
    return {"model": "model", "temperature": 0, **said, **asked}


def told(path: str, found: Any) -> tuple[str, int, str]:
    """The text of an answer, how many tokens the client is told of, and why it ended."""
    if path == RESPONSES:
        [[part]] = [one["content"] for one in found["output"]]
        return part["text"], found["usage"]["output_tokens"], found["status"]
    choice, counted = found["choices"][0], found["usage"]["completion_tokens"]
    if path == COMPLETIONS:
        return choice["text"], counted, choice["finish_reason"]
    calls = [one["function"]["arguments"] for one in choice["message"].get("tool_calls") or ()]
    return "".join(calls) or choice["message"]["content"], counted, choice["finish_reason"]


def ask(server: Server, path: str, asked: dict[str, Any], text: str) -> tuple[str, int, str]:
    status, found = post(server, path, body(path, asked, text))
    assert status == 200, found
    return told(path, found)


def counted(server: Server, before: Counter[str], policy: str) -> dict[str, int]:
    """What a counter of answers has gained since, by policy; of this one something."""
    wait_for(lambda: by_policy(server, "exit_layer_count")[policy] > before[policy])
    return dict(by_policy(server, "exit_layer_count") - before)


def number_of_tokens(text: str) -> int:
    """Of an answer with its end, as the tokenizer writes it: the policy has it so, too."""
    return len(byte_tokenizer().encode(text)) + 1


@pytest.mark.parametrize("name", EARLY)
def test_every_way_to_ask_for_the_schema_gets_the_same_early_object(server, name):
    for text in TEXTS[:2]:
        found = []
        for path, asked in EARLY["structured_outputs"], EARLY[name]:
            before = by_policy(server, "exit_layer_count")
            found.append(ask(server, path, asked, text)[:2])
            assert counted(server, before, "default") == {"default": 1}, "one answer, early"
        [(written, tokens), other] = found
        assert other == (written, tokens)
        assert tokens == number_of_tokens(written)
        values = json.loads(written)
        assert values.keys() == VALUES.keys()
        assert all(values[key] in VALUES[key] for key in VALUES)


@pytest.mark.parametrize("name", FULL)
def test_all_other_requests_run_to_full_depth(server, name):
    path, asked = FULL[name]
    before = by_policy(server, "exit_layer_count")
    status, found = post(server, path, body(path, asked))
    assert status == 200, found
    assert counted(server, before, NO_POLICY).keys() == {NO_POLICY}


def test_a_stream_has_the_object_in_one_delta_and_says_how_many_tokens_it_is(server, client):
    """By the function of the page, and the same of a function's arguments and of Responses."""
    expected, tokens, _ = ask(server, *EARLY["response_format"], TEXTS[0])
    deltas_of = code_of("structured.md")["deltas_of"]
    assert deltas_of(client, "model", SCHEMA, TEXTS[0]) == ([expected], tokens)
    events = client.chat.completions.create(**body(*EARLY["a function"]), stream=True)
    deltas = [choice.delta for event in events for choice in event.choices]
    calls = [one.function for delta in deltas for one in delta.tool_calls or ()]
    assert [one.arguments for one in calls if one.arguments] == [expected]
    written = [
        event.delta
        for event in client.responses.create(**body(*EARLY["Responses"]), stream=True)
        if event.type == "response.output_text.delta"
    ]
    assert written == [expected]


def test_a_client_reads_how_probable_each_value_is(client):
    """Of the early object, in the way of the documentation, streamed or not."""
    asked = body(*EARLY["log-probabilities"])
    [choice] = client.chat.completions.create(**asked).choices
    found = field_probabilities(choice.logprobs.content, SCHEMA)
    written = json.loads(choice.message.content)
    for field, values in VALUES.items():
        names = [one if isinstance(one, str) else json.dumps(one) for one in values]
        assert found[field].keys() == set(names)
        assert sum(found[field].values()) == pytest.approx(1)
        best = max(found[field], key=found[field].get)
        assert values[names.index(best)] == written[field]
        assert min(found[field].values()) > 0.01, "random heads are not sure"
    events = client.chat.completions.create(**asked, stream=True)
    streamed = [one.logprobs.content for event in events for one in event.choices if one.logprobs]
    [content] = [one for one in streamed if one]
    assert content == choice.logprobs.content
    forced = [one for one in content if one.logprob == 0]
    assert len(content) - len(forced) == len(VALUES)


def leave(server: Server, asked: dict[str, Any], after: float, share: float = 1.0) -> None:
    """Send a request, or a share of it, and hang up after some seconds without reading."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(asked).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + content[: int(share * len(content))])
        time.sleep(after)


def reload_policies(server: Server, end: Event) -> int:
    """Reload them again and again; how often."""
    times = 0
    while not end.wait(0.05):
        asked = urllib.request.Request(server.url + "/adainfer/reload", method="POST")
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert answer.status == 200
        times += 1
    return times


def test_clients_that_hang_up_and_reloads_leave_nothing_behind_and_change_no_answer(server):
    """A step may lack the room for a guess: then full depth answers."""
    kinds = [EARLY["response_format"], EARLY["a function"], FULL["opted out"]]
    wanted = [(*kind, text) for kind in kinds for text in TEXTS]
    alone = {json.dumps(one): ask(server, *one) for one in wanted}
    deep = {text: alone[json.dumps((*FULL["opted out"], text))] for text in TEXTS}
    before = by_policy(server, "exit_layer_count")["default"]
    end = Event()
    with ThreadPoolExecutor(40) as pool:
        reloaded = pool.submit(reload_policies, server, end)
        left = [pool.submit(hang_up, server, body(*one)) for one in 2 * wanted]
        for place, one in enumerate(4 * wanted):
            after, share = 0.02 * (place % 4), 0.5 if place % 7 == 0 else 1.0
            asked = {**body(*one), "stream": place % 2 == 0}
            left.append(pool.submit(leave, server, asked, after, share))
        answers = [(one, pool.submit(ask, server, *one)) for one in 8 * wanted]
        for one, answer in answers:
            found = answer.result()
            assert found in (alone[json.dumps(one)], deep[one[2]])
        for gone in left:
            gone.result()
        end.set()
        assert reloaded.result() > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        wait_for(lambda name=name: not sum(server.metrics(f"vllm:{name}{{").values()))
    assert by_policy(server, "exit_layer_count")["default"] - before > len(wanted)
    assert [ask(server, *one) for one in wanted] == [*alone.values()]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_schemas_hold_nobody_up(server, kind):
    asked, text = EARLY["response_format"], TEXTS[0]
    hostile = body(CHAT, {"structured_outputs": {"json": HOSTILE[kind]}})
    before = ask(server, *asked, text)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(post, server, CHAT, hostile)
        assert ask(server, *asked, text) == before
        status, found = answer.result(120)
    assert status == 200 or found["error"]
    assert server.get("/health") == ""
