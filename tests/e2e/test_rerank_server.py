"""A reranker over HTTP: good clients beside hostile ones, sampled queries, and captured ones."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.common.server import Server, serving
from tests.classifier import classifier
from tests.e2e.test_classifier import CLOSE, config_of
from tests.e2e.test_serve import FLAGS, environment, post
from tests.tiny import EXIT_POINTS, tiny_artifact
from vllm_adainfer.offline.calibration.data.examples import read_rows
from vllm_adainfer.offline.calibration.data.read_examples import read_examples
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.promise.first_documents import FirstDocuments
from vllm_adainfer.watch.units import ENDED_SINCE

pytestmark = pytest.mark.full
TEMPLATE = "Review : {{ messages[0].content }} Sentiment : {{ messages[1].content }}"
FLAGS = (*FLAGS[:-2], "--no-enable-prefix-caching", "--chat-template", TEMPLATE)
WORDS = ["a", "warm", "and", "clever", "film", "the", "plot", "is", "slow", "but", "never", "dull"]
_DRAW = np.random.default_rng(5)
QUERIES = [
    (" ".join(_DRAW.choice(WORDS, 3)), [" ".join(_DRAW.choice(WORDS, 2 + i % 9)) for i in range(7)])
    for _ in range(40)
]
QUERY, DOCUMENTS = QUERIES[0]
TOP = FirstDocuments(k=2, margin=0.01)
GOOD = {"model": "model", "query": QUERY, "documents": DOCUMENTS}
HOSTILE: list[tuple[str, Any]] = [
    ("/rerank", {"model": "model", "query": QUERY}),
    ("/rerank", {**GOOD, "query": None}),
    ("/rerank", {**GOOD, "query": {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}}),
    ("/rerank", {**GOOD, "documents": []}),
    ("/rerank", {**GOOD, "documents": "word " * 5000}),
    ("/rerank", {**GOOD, "documents": [3, None, {"a": 1}]}),
    ("/rerank", {**GOOD, "top_n": -1}),
    ("/rerank", {**GOOD, "request_id": "x" * 1_000_000}),
    ("/rerank", {**GOOD, "chat_template_kwargs": {"tokenize": True}}),
    ("/rerank", {**GOOD, "use_activation": "perhaps"}),
    ("/score", {"model": "model", "text_1": [QUERY] * 2, "text_2": DOCUMENTS[:3]}),
    ("/score", {"model": "model", "text_1": "", "text_2": ""}),
    ("/classify", {"model": "model", "input": []}),
    ("/classify", {"model": "model", "input": [[]]}),
    ("/classify", {"model": "model", "input": [-1, 10**9]}),
    ("/classify", {"model": "model", "input": "word " * 5000}),
    ("/classify", {"model": "other", "input": "a"}),
    ("/classify", {"model": "model", "input": "a", "vllm_xargs": {"adainfer_policy": "no"}}),
    ("/classify", {"model": "model", "input": "a", "extra_kwargs": {"_adainfer": 1}}),
    ("/pooling", {"model": "model", "input": "a", "task": "token_classify"}),
    ("/pooling", {"model": "model", "input": "a", "task": "embed"}),
    ("/v1/embeddings", {"model": "model", "input": "a"}),
    ("/v1/completions", {"model": "model", "prompt": "a", "max_tokens": 1}),
]


@pytest.fixture(scope="module")
def reranker(tiny_model, tmp_path_factory) -> Path:
    return classifier(tiny_model, tmp_path_factory.mktemp("reranker") / "sigmoid", 1)


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("captured")
    return directory


@pytest.fixture(scope="module")
def server(reranker, captured, tmp_path_factory) -> Iterator[Server]:
    """Every early answer is wrong by far, and a third of the queries are watched."""
    directory = tmp_path_factory.mktemp("served")
    promise = {"risk": "probability", "top_k": TOP}
    thresholds = torch.full((2, len(EXIT_POINTS)), -10.0)  # all leave at the first exit point
    policy = tiny_artifact(
        reranker, directory / "policy", thresholds, **(config_of(reranker) | promise)
    )
    switch = {
        "artifact": str(policy),
        "min_rows_saved": 1,
        "shadow_rate": 0.3,
        "capture": {"directory": str(captured), "rate": 0.5, "limit": 20_000},
    }
    with serving(str(reranker), switch, directory / "log", FLAGS, environment()) as running:
        yield running


@pytest.fixture(scope="module")
def full_depth(reranker, tmp_path_factory) -> list[list[float]]:
    """The scores of stock vLLM."""
    log = tmp_path_factory.mktemp("stock") / "log"
    with serving(str(reranker), None, log, FLAGS, environment(VLLM_PLUGINS="")) as stock:
        return [scores(stock, *one) for one in QUERIES]


def scores(server: Server, query: str, documents: list[str], **more: Any) -> list[float]:
    status, reply = post(
        server, "/rerank", {**GOOD, "query": query, "documents": documents, **more}
    )
    assert status == 200, reply
    by_place = {result["index"]: result["relevance_score"] for result in reply["results"]}
    return [by_place[place] for place in range(len(documents))]


def attack(server: Server, hostile: tuple[str, Any]) -> int:
    path, body = hostile
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def hang_up(server: Server) -> None:
    """Send a query and close the connection before the answer."""
    body = json.dumps({**GOOD, "documents": DOCUMENTS * 40}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = "POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def is_closed(server: Server) -> bool:
    """Whether the policy has been found to break its promise."""
    [allowed] = {
        value
        for name, value in server.metrics("adainfer:policy_exits_allowed{").items()
        if 'epsilon="0.05"' in name
    }
    return allowed == 0


@pytest.fixture(scope="module")
def alone(server) -> list[list[float]]:
    """The scores of queries that are sent one after the other."""
    return [scores(server, *one) for one in QUERIES]


@pytest.mark.parametrize("ids", [{}, {"request_id": "mine"}], ids=["of vLLM", "the same for all"])
def test_a_query_is_watched_as_a_whole_whatever_id_its_client_uses(server, full_depth, ids):
    """All its documents have full depth's scores, or none has.

    A client learns by the time of one answer nothing about the next.
    """
    watched = 0
    for one, full in zip(QUERIES, full_depth, strict=True):
        moves = np.abs(np.array(scores(server, *one, **ids)) - full)
        assert (moves < CLOSE).all() or (moves > 0).all()
        watched += bool((moves < CLOSE).all())
    assert 3 <= watched <= 25  # of 40, at a rate of 0.3


def test_hostile_requests_cost_nobody_an_answer(server, alone, full_depth):
    """A good query has the scores that it has alone, or full depth's where it is watched.

    Queries that run at the moment when the policy is closed have some of either.
    """
    clients = 12
    with ThreadPoolExecutor(clients) as pool:
        statuses = [pool.submit(attack, server, one) for one in HOSTILE * 3]
        for _ in range(10):
            pool.submit(hang_up, server)
        good = [pool.submit(scores, server, *one) for one in QUERIES]
        found = [future.result() for future in good]
    assert {future.result() for future in statuses} <= {200, 400, 404, 405, 413, 422}
    assert server.get("/health") == ""
    mixed = 0
    for again, before, full in zip(map(np.array, found), alone, full_depth, strict=True):
        if before == pytest.approx(full, abs=CLOSE):
            continue  # it was watched when it was alone, too: its early scores are not known
        as_full, as_early = abs(again - full) < CLOSE, abs(again - before) < CLOSE
        assert (as_full | as_early).all()
        mixed += not (as_full.all() or as_early.all())
    assert mixed <= (clients if is_closed(server) else 0)


def test_an_order_that_breaks_its_promise_is_closed(server, alone, full_depth):
    """The counters count queries, and then all run at full depth."""
    pairs = [*zip(map(np.array, alone), map(np.array, full_depth), strict=True)]
    assert any(TOP.breaks(*one) for one in pairs)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2 + ENDED_SINCE // (7 * len(QUERIES))):
            for _ in pool.map(lambda one: scores(server, *one), QUERIES):
                pass
    checked = sum(server.metrics("adainfer:shadow_checked_total").values())
    assert 0 < checked < 40 * 8
    assert is_closed(server)
    for one, full in zip(QUERIES, full_depth, strict=True):
        assert scores(server, *one) == pytest.approx(full, abs=CLOSE)


def test_captured_queries_are_whole_and_calibrate(server, captured, reranker):
    for query, documents in 3 * QUERIES:
        scores(server, query, documents, request_id="x" * 10_000)
    longest = max(len(line) for path in captured.iterdir() for line in path.open())
    assert longest < 10_000  # whatever ids clients choose
    hf_config, tokenizer = load_config_and_tokenizer(str(reranker))
    rows = read_rows(captured)
    examples = read_examples(rows, tokenizer, hf_config, None, None, "label", 512)
    sizes: dict[str | None, int] = {}
    for example in examples:
        sizes[example.group] = sizes.get(example.group, 0) + 1
    queries = [size for group, size in sizes.items() if str(group).startswith("score-")]
    asked = {
        tuple(AutoTokenizer.from_pretrained(reranker).encode(f"Review : {q} Sentiment : {d}"))
        for q, documents in QUERIES
        for d in documents
    }
    assert asked & {tuple(example.token_ids) for example in examples}
    assert queries.count(7) > 40
    whole = [size for size in queries if size not in (7, 3, 1)]  # hostile ones have other numbers
    assert len(whole) < 20
