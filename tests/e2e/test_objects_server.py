"""Objects over HTTP: what clients of a server with a policy get, and of the same without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.server import Server, serving
from tests.byte_model import save_byte_model
from tests.e2e.objects import SCHEMA, VALUES, save_policy
from tests.e2e.structured_bodies import CHAT, in_format
from tests.e2e.test_serve import environment, post
from tests.e2e.test_structured_server import FLAGS, hang_up
from tests.waiting import wait_for

pytestmark = pytest.mark.full

ASKS: dict[str, dict[str, Any]] = {
    "response_format": in_format(SCHEMA, strict=True),
    "structured_outputs": {"structured_outputs": {"json": SCHEMA}},
}
TEXTS = ["a warm and clever film", "the plot is slow", "never", "a film", "what a plot, no film"]
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}
HOSTILE: dict[str, dict[str, Any]] = {
    "large": {**SCHEMA, "description": "x" * (1 << 17)},
    "deep": DEEP,
    "recursive": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
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
    folder = tmp_path_factory.mktemp("served")
    model = save_byte_model(folder / "model")
    thresholds = torch.full((2, 3), -1.0)  # every object is early
    policy: Path = save_policy(model, folder / "policy", thresholds, space=" ")
    switch = {"artifact": str(policy), "min_rows_saved": 1}
    with serving(str(model), switch, folder / "server.log", FLAGS, environment()) as running:
        yield running


def body(kind: str, text: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "model",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 120,
        **ASKS[kind],
        **more,
    }


def answer(server: Server, kind: str, text: str, **more: Any) -> tuple[dict[str, Any], int]:
    """The object, and how many tokens the client is told that it has."""
    status, found = post(server, CHAT, body(kind, text, **more))
    assert status == 200, found
    [choice] = found["choices"]
    return json.loads(choice["message"]["content"]), found["usage"]["completion_tokens"]


def is_one(found: dict[str, Any]) -> bool:
    return found.keys() == VALUES.keys() and all(found[key] in VALUES[key] for key in VALUES)


def test_every_way_to_ask_gets_the_same_early_object(server):
    for text in TEXTS:
        first, other = [answer(server, kind, text) for kind in ASKS]
        assert is_one(first[0])
        assert other == first
        at_full_depth, _ = answer(server, "response_format", text, vllm_xargs={"adainfer": 0})
        assert is_one(at_full_depth)


def test_many_clients_at_once_of_whom_some_hang_up_get_what_each_gets_alone(server):
    wanted = [(kind, text) for kind in ASKS for text in TEXTS]
    alone = [answer(server, *one) for one in wanted]
    with ThreadPoolExecutor(40) as pool:
        left = [pool.submit(hang_up, server, body(*one)) for one in 2 * wanted]
        asked = [pool.submit(answer, server, *one) for one in 12 * wanted]
        assert [one.result() for one in asked] == 12 * alone
        for one in left:
            one.result()
    assert server.get("/health") == ""


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_schemas_hold_nobody_up(server, kind):
    schema = {"structured_outputs": {"json": HOSTILE[kind]}}
    before = answer(server, "response_format", TEXTS[0])
    with ThreadPoolExecutor(2) as pool:
        hostile = pool.submit(post, server, CHAT, {**body("response_format", "a"), **schema})
        assert answer(server, "response_format", TEXTS[0]) == before
        hostile.result(120)
    assert server.get("/health") == ""
    wait_for(lambda: sum(server.metrics("adainfer:").values()) > 0)
