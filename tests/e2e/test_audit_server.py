"""A server's audit of all that clients do at once, hostile ones among them, and its counters."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from benchmarks.common.server import Server, serving
from benchmarks.soak import hostile_requests
from tests.byte_model import save_byte_model
from tests.e2e.test_choice_exits import PROMPTS, SETS, TOKENIZER, config_of
from tests.e2e.test_serve import FLAGS, environment
from tests.tiny import EXIT_POINTS, LAYERS, tiny_artifact
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.engine.compat.requests import LONGEST
from vllm_adainfer.offline.reports.audit import read_audit, summed_up

DIGITS = [TOKENIZER.convert_tokens_to_ids(digit) for digit in "01"]
GAP = 0.2  # some leave at each exit point, and some never
LONGEST_LINE = 6 * (LONGEST + 64) + 1000  # bytes: ids are escaped, the rest is short
WAIT_SECONDS = 60
HANGS_UP = -1

# Ids that clients send: in the body as JSON, or as the bytes of a header.
BODY_IDS = [
    "two\nlines", 'a", "policy": "forged', '{"lost": 9}', "\0", "\u2028", "x" * 2**20, "é" * 3000,
    "-", "", "same", "same", "same-0", "cmpl-same-0",
]  # fmt: skip
HEADER_IDS = [b"\xff\xfe\xfd", b"x" * 20_000, b'"}\t{"', b"a\r\n folded", b"same", b"same", b"\x01"]
CHOICES = [["two\nlines", "two\nmore"], ['{"lost": 4}', "}{"], ["\0", "é"], ["x" * 3000, "y"]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    found: Path = tmp_path_factory.mktemp("audit") / "lines"
    return found


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    model = save_byte_model(folder)
    thresholds = torch.full((2, len(EXIT_POINTS)), GAP)
    labels = tuple(Label(name=name, token_id=id_) for name, id_ in zip("01", DIGITS, strict=True))
    policies = {
        "digit": tiny_artifact(model, folder / "digit", thresholds, labels=labels),
        "mood": tiny_artifact(model, folder / "mood", thresholds, **config_of("mood")),
    }
    switch = {
        "artifact": {name: str(policy) for name, policy in policies.items()},
        "min_rows_saved": 1,
        "shadow_rate": 0.3,
        "audit": {"directory": str(directory)},
    }
    with serving(str(model), switch, folder / "log", FLAGS, environment()) as running:
        yield running


def exchange(server: Server, body: bytes, headers: bytes = b"", until: bytes | None = b"") -> int:
    """Send a request; the status of the answer, or `HANGS_UP`.

    Args:
        server: to whom.
        body: sent as it is.
        headers: more lines of the head, as they are.
        until: hang up once the answer has so many bytes of it; None does not wait for any.

    """
    address = urlsplit(server.url)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    answer = b""
    with socket.create_connection((address.hostname, address.port or 80), timeout=120) as line:
        line.sendall(head + headers + b"\r\n" + body)
        if until is None:
            time.sleep(random.uniform(0, 0.05))
            return HANGS_UP
        while part := line.recv(65536):
            answer += part
            if until and until in answer:
                return HANGS_UP
    return int(answer.split(b" ", 2)[1])


def mixed_load(server: Server) -> list[Callable[[], Any]]:
    """Requests; each returns its status, those that it may get, and what it was."""
    draw = random.Random(0)
    jobs = []

    def add(body: Any, statuses: tuple[int, ...] = (200,), **how: Any) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        jobs.append(lambda: (exchange(server, raw, **how), statuses, raw[:60] + raw[-60:], how))

    common: dict[str, Any] = {"model": "model", "temperature": 0}
    one = {**common, "max_tokens": 1, "allowed_token_ids": DIGITS}
    choice = {**common, "structured_outputs": {"choice": SETS["mood"]}}
    text = {**common, "max_tokens": 40, "ignore_eos": True}
    for prompt in PROMPTS:
        asked = {"prompt": [*prompt, draw.choice(DIGITS)]}
        add({**one, **asked})
        add({**one, **asked, "vllm_xargs": {"adainfer": 0}})
        add({**one, **asked, "vllm_xargs": {"adainfer_epsilon": 0.02}})
        add({**one, "prompt": [asked["prompt"], prompt]})
        add({**choice, **asked})
        add({**text, **asked, "max_tokens": 5})
        add({**text, **asked}, (HANGS_UP, 200), until=None)
        add({**text, **asked, "stream": True}, (HANGS_UP, 200), until=b"data: ")
    short = {**one, "prompt": PROMPTS[3]}
    for name in BODY_IDS:
        add({**short, "request_id": name}, (200, 400))
    # vLLM cannot encode the answer's id, once it has the answer.
    add({**short, "request_id": "\ud800"}, (500,))
    for raw in HEADER_IDS:
        add(short, (200, 400), headers=b"X-Request-Id: " + raw + b"\r\n")
    add(short, headers=b"traceparent: 00-" + b"4b" * 5000 + b"\r\n")
    for choices in CHOICES:
        add({**choice, "prompt": PROMPTS[4], "structured_outputs": {"choice": choices}}, (200, 400))
    body = {"model": "model", "prompt": "a", "max_tokens": 1, "temperature": 0}
    for _, hostile, statuses in hostile_requests.hostile(body):
        add(hostile, statuses)
    draw.shuffle(jobs)
    return jobs


def counted(server: Server) -> dict[str, Any]:
    """What the counters say of all tokens, and of those of one-token requests under a policy."""
    depths, digits = Counter[str](), Counter[str]()
    for series, value in server.metrics("adainfer:exit_layer_bucket{").items():
        [[depth, policy]] = re.findall('le="([^"]*)".*policy="([^"]*)"', series)
        depths[depth] += int(value)
        digits[depth] += int(value) * (policy == "digit")
    shadow = server.metrics("adainfer:shadow_checked_total{").values()
    return {"depths": single(depths), "digits": single(digits), "shadow": int(sum(shadow))}


def single(at_most: Counter[str]) -> Counter[int]:
    """How many are at each depth, from how many are at most there."""
    found, before = Counter[int](), 0
    for depth in sorted((depth for depth in at_most if depth != "+Inf"), key=float):
        found[int(float(depth))] = at_most[depth] - before
        before = at_most[depth]
    return +found


def written(directory: Path) -> list[dict[str, Any]]:
    """The lines of the audit."""
    text = b"".join(path.read_bytes() for path in sorted(directory.iterdir()))
    return [json.loads(line) for line in text.splitlines()]


def added_up(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The same sums from the audit."""
    depths, digits = Counter[int](), Counter[int]()
    for line in lines:
        layers = Counter({int(depth): count for depth, count in line["layers"].items()})
        depths += layers
        if line["policy"] == "digit":
            digits += layers
    shadow = sum(line["outcomes"].get("shadow", 0) for line in lines)
    return {"depths": depths, "digits": digits, "shadow": shadow}


def test_under_a_mixed_and_hostile_load_the_audit_adds_up_to_the_counters(server, directory):
    jobs = mixed_load(server)
    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(lambda job: job(), jobs))
    assert [one for one in outcomes if one[0] not in one[1]] == []
    assert server.get("/health") == ""

    end = time.monotonic() + WAIT_SECONDS
    while (found := counted(server)) != (sums := added_up(written(directory))):
        assert time.monotonic() < end, f"the counters say {found}, the audit {sums}"
        time.sleep(0.2)
    lines = written(directory)
    assert {line["policy"] for line in lines} == {"digit", "mood", None}
    outcomes_written = sum((Counter(line["outcomes"]) for line in lines), Counter[str]())
    assert outcomes_written.keys() == {"early", "full_depth", "shadow"}
    assert sum(line["ended"] == "abort" for line in lines) > 0
    assert {int(depth) for line in lines for depth in line["layers"]} >= {EXIT_POINTS[0], LAYERS}

    raw = [line for path in directory.iterdir() for line in path.read_bytes().splitlines()]
    assert max(map(len, raw)) < LONGEST_LINE
    assert 200 < max(len(line["request"]) for line in lines) <= LONGEST
    table = summed_up(read_audit([directory]))
    assert "digit" in table
    assert "lost" not in table
