"""A real server: what goes over HTTP, what its metrics say, and the other commands of vLLM."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks.common.server import Server, serving
from tests import student
from tests.e2e import pooled
from tests.e2e.tasks import Case, cases
from tests.e2e.test_tasks import prompts_of
from tests.tiny import LABELS, LAYERS, tiny_config, tiny_tensors, word_tokenizer
from tests.waiting import wait_for
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.settings.engine import NO_POLICY

ENVIRONMENT = {
    "VLLM_PLUGINS": "adainfer",
    "VLLM_SERVER_DEV_MODE": "1",  # has /reset_prefix_cache
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_LOG_STATS_INTERVAL": "1",
}
FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32",
    "--max-num-batched-tokens", "256",
    "--chat-template", "{% for message in messages %}{{ message['content'] }}{% endfor %}",
)  # fmt: skip


def framed(prompt: list[int], question: str = "positive film :") -> list[int]:
    """A prompt that asks a question about a text."""
    encode = word_tokenizer().encode
    return [*encode("Review :"), *prompt, *encode(question)]


def environment(**more: str) -> dict[str, str]:
    """Of a process of its own: conftest's is for engines in this one."""
    return {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **more}


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    """Where the server keeps all requests."""
    directory: Path = tmp_path_factory.mktemp("captured")
    return directory


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> Path:
    """Where the server says where each answer came from."""
    directory: Path = tmp_path_factory.mktemp("audited")
    return directory


@pytest.fixture(scope="module")
def with_student(tiny_model) -> Artifact:
    """A policy for one question, that asks a student before the first layer."""
    shared = SharedTokens(start=framed([])[:2], end=framed([])[2:])
    asked = {"exit_points": (0, 5), **student.asked_with(shared), "labels": pooled.OTHERS}
    whole = {"risk": "probability", "tolerance": 0.05, "label_mass": True}
    config = tiny_config(tiny_model, levels=pooled.LEVELS, **asked, **whole)
    tensors = tiny_tensors(config, *pooled.thresholds(config))
    return Artifact(config, tensors, encoder=student.encoder())


@pytest.fixture(scope="module")
def server(
    tiny_model, sources, with_student, captured, audited, tmp_path_factory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    asked = tmp_path_factory.mktemp("student") / "asked"
    encoder, tokenizer = student.encoder(), student.tokenizer()
    save_artifact(asked, with_student.config, with_student.tensors, {}, "", encoder, tokenizer)
    artifacts = {**sources, "asked": str(asked)}
    audit = {"directory": str(audited)}
    capture = {"directory": str(captured), "rate": 1, "limit": 20_000}
    switch = {"artifact": artifacts, "min_rows_saved": 1, "capture": capture, "audit": audit}
    with serving(str(tiny_model), switch, log, FLAGS, environment()) as running:
        yield running


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def completion(case: Case) -> dict[str, Any]:
    """A case as a request."""
    return {
        "model": "model",
        "prompt": case.prompt,
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
        "allowed_token_ids": case.params.allowed_token_ids,
        "vllm_xargs": case.params.extra_args,
    }


def answers(server: Server, wanted: list[Case]) -> list[int]:
    """The tokens, of requests that come together."""
    with ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(lambda case: post(server, "/v1/completions", completion(case)), wanted)
        )
    assert [status for status, _ in found] == [200] * len(wanted)
    return [body["choices"][0]["token_ids"][0] for _, body in found]


def by_policy(server: Server, name: str) -> Counter[str]:
    """A counter of the server's, by the label `policy`."""
    found: Counter[str] = Counter()
    for series, value in server.metrics(f"adainfer:{name}{{").items():
        found[series.split('policy="')[1].split('"')[0]] += int(value)
    return found


def wait_for_counters(server: Server, decided: int) -> None:
    """Counters come a moment after the last answer: wait until so many tokens are counted."""
    wait_for(lambda: by_policy(server, "exit_layer_count").total() == decided)


def asked_over_http(path: str, text: str, question: str, labels: list[int]) -> dict[str, Any]:
    """A request that asks a question about a text, as clients of `path` do."""
    if path == "/generative_scoring":
        return {"query": f"Review : {text}", "items": [question], "label_token_ids": labels}
    body = {"model": "model", "max_tokens": 1, "temperature": 0, "allowed_token_ids": labels}
    prompt = f"Review : {text} {question}"
    if path == "/v1/completions":
        return {**body, "prompt": prompt}
    return {**body, "messages": [{"role": "user", "content": prompt}]}


def test_other_questions_with_the_same_labels_are_never_answered_early(
    server, with_student, audited
):
    """Three of them, a hundred times each; the student, which reads the text alone, is sure."""
    generator, tokenizer = np.random.default_rng(3), word_tokenizer()
    labels = list(with_student.config.label_ids)
    paths = ("/v1/completions", "/v1/chat/completions", "/generative_scoring")

    def ask(question: str) -> Counter[str]:
        """By the reason, how many of a hundred no policy covers; how many leave early."""
        texts = [tokenizer.decode(generator.integers(100, 1000, 8)) for _ in range(100)]
        before = counted()
        with ThreadPoolExecutor(16) as pool:
            sent = [
                (path, asked_over_http(path, text, question, labels))
                for text, path in zip(texts, itertools.cycle(paths), strict=False)
            ]
            found = list(pool.map(lambda one: post(server, *one)[0], sent))
        assert found == [200] * 100
        total = sum(before["decided"].values()) + 100
        wait_for_counters(server, total)
        after = counted()
        return Counter({name: after[name]["asked"] - before[name]["asked"] for name in after})

    def counted() -> dict[str, Counter[str]]:
        names = {"decided": "exit_layer_count", "other": "requests_not_covered_total"}
        return {name: by_policy(server, series) for name, series in names.items()}

    assert ask("positive film :") == {"decided": 100, "other": 0}
    for question in ("negative film :", "positive film", "slow positive film : never"):
        assert ask(question) == {"decided": 0, "other": 100}
    lines = [json.loads(line) for path in audited.iterdir() for line in path.open()]
    refused = [line for line in lines if line.get("not_covered") == "other_prompt"]
    assert len(refused) == 300
    assert {(line["policy"], *line["layers"]) for line in refused} == {(None, str(LAYERS))}


def test_each_request_gets_its_own_policys_answer_and_all_counters_add_up(server, tasks, reference):
    names = (
        "layer_rows_executed_total",
        "layer_rows_skipped_total",
        "exit_layer_count",
        "exit_layer_sum",
    )
    before = {name: by_policy(server, name) for name in names}
    generated = server.metrics("vllm:generation_tokens_total")
    wanted = cases(tasks, reference, prompts_of(40, 80), 40)
    assert answers(server, wanted) == [case.token for case in wanted]
    wait_for_counters(server, before["exit_layer_count"].total() + len(wanted))
    executed, skipped, count, layers = (by_policy(server, n) - before[n] for n in names)
    rows, requests, depths = Counter[str](), Counter[str](), Counter[str]()
    for case in wanted:
        rows[case.task] += len(case.prompt)
        requests[case.task] += 1
        depths[case.task] += case.depth
    assert count == requests
    assert layers == depths
    assert executed + skipped == Counter({name: LAYERS * n for name, n in rows.items()})
    assert set(skipped) == {"mood", "topic", "next"}
    [key] = generated
    assert server.metrics(key)[key] - generated[key] == sum(count.values())
    [share] = server.metrics("adainfer:probe_seconds_total").values()
    assert 0 < share < sum(server.metrics("adainfer:forward_seconds_total").values())


def audit_lines(audited: Path, count: int) -> list[dict[str, Any]]:
    """The lines of the audit, once there are so many."""

    def written() -> str:
        return "".join(path.read_text() for path in sorted(audited.iterdir()))

    wait_for(lambda: written().count("\n") >= count)
    return [json.loads(line) for line in written().splitlines()]


def test_the_audit_says_of_each_request_what_the_counters_say_of_all(
    server, audited, tasks, sources, reference
):
    done = len(audit_lines(audited, 0))
    before = {name: by_policy(server, name) for name in ("exit_layer_count", "exit_layer_sum")}
    wanted = cases(tasks, reference, prompts_of(44, 80), 44)
    assert answers(server, wanted) == [case.token for case in wanted]
    wait_for_counters(server, before["exit_layer_count"].total() + len(wanted))
    count, layers = (by_policy(server, name) - earlier for name, earlier in before.items())
    lines = audit_lines(audited, done + len(wanted))[done:]
    requests, depths = Counter[str](), Counter[str]()
    for line in lines:
        policy = line["policy"] or NO_POLICY
        [depth] = line["layers"]
        requests[policy] += 1
        depths[policy] += int(depth)
        assert (line["outcomes"] == {"early": 1}) == (int(depth) < LAYERS)
        if policy != NO_POLICY:
            assert line["artifact"] == load_artifact(sources[policy]).digest
    assert requests == count
    assert depths == layers
    assert Counter(line["answer"][0] for line in lines) == Counter(case.token for case in wanted)


def test_streamed_and_chat_answers_are_the_same_and_leave_early(server, tasks, reference):
    wanted = [
        case for case in cases(tasks, reference, prompts_of(41, 40), 41) if case.task == "mood"
    ]
    before = by_policy(server, "exit_layer_count")
    for case in wanted:
        body = json.dumps({**completion(case), "stream": True}).encode()
        request = urllib.request.Request(
            server.url + "/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            lines = [line[6:] for line in response.read().decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        [token] = [
            t for line in lines[:-1] for c in json.loads(line)["choices"] for t in c["token_ids"]
        ]
        assert token == case.token
    labels = wanted[0].params.allowed_token_ids
    message = {"role": "user", "content": "a warm and clever film"}
    body = {**completion(wanted[0]), "messages": [message], "allowed_token_ids": labels}
    del body["prompt"]
    status, chat = post(server, "/v1/chat/completions", body)
    assert status == 200
    assert chat["choices"][0]["message"]["content"].strip() in LABELS
    wait_for_counters(server, before.total() + len(wanted) + 1)
    assert (by_policy(server, "exit_layer_count") - before)["mood"] == len(wanted) + 1


@contextmanager
def scraping(server: Server) -> Iterator[list[dict[str, float]]]:
    """Read all counters again and again, in a thread, and six times on the slowest machine."""
    found: list[dict[str, float]] = []
    over = Event()

    def scrape() -> None:
        while not over.wait(0.05) or len(found) < 6:
            found.append(server.metrics())

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(scrape)
        yield found
        over.set()
        reading.result()


@pytest.mark.parametrize("clients", [1, 6])
def test_texts_leave_early_and_no_counter_of_the_server_ever_falls(server, clients):
    """Rows that left wait and rejoin: of one client alone as of several at once."""
    names = "layer_rows_executed_total", "layer_rows_skipped_total", "layer_rows_deferred_total"
    before = {name: by_policy(server, name) for name in names}
    decided = by_policy(server, "exit_layer_count")
    prompts, tokens = prompts_of(60 + clients, 12), 32

    def generate(prompt: list[int]) -> tuple[int, Any]:
        body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return post(server, "/v1/completions", body)

    with scraping(server) as scraped, ThreadPoolExecutor(clients) as pool:
        answered = list(pool.map(generate, prompts))
    assert [status for status, _ in answered] == [200] * len(prompts)
    assert [body["usage"]["completion_tokens"] for _, body in answered] == [tokens] * len(prompts)
    assert server.get("/health") == ""
    wait_for_counters(server, decided.total() + tokens * len(prompts))
    for series in scraped[-1]:
        if series.partition("{")[0].endswith(("_total", "_count", "_bucket", "_sum")):
            values = [one.get(series, 0) for one in scraped]
            assert values == sorted(values), series
    executed, skipped, deferred = (
        (by_policy(server, name) - before[name])["next"] for name in names
    )
    rows = sum(map(len, prompts)) + len(prompts) * (tokens - 1)
    assert executed + skipped == rows * LAYERS
    assert deferred > 0, "some rows have to wait"


def captured_bodies(directory: Path, prompt: list[int]) -> list[dict[str, Any]]:
    """The bodies of captured requests with a prompt, once there is one."""

    def found() -> list[dict[str, Any]]:
        lines = [line for path in directory.iterdir() for line in path.read_text().splitlines()]
        bodies = [json.loads(line)["body"] for line in lines]
        return [body for body in bodies if body["prompt"] == prompt]

    return wait_for(found)


def test_requests_are_captured_token_for_token_by_whatever_endpoint_they_come(
    server, captured, tiny_model, tasks
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    labels = list(tasks["mood"].config.label_ids)
    texts = ["a clever film but never a dull plot", "the plot is a slow film", "never a warm film"]
    prompts = [tokenizer.encode(text) for text in texts]
    common = {"model": "model", "max_tokens": 1, "temperature": 0}
    choice = {"structured_outputs": {"choice": list(LABELS)}}
    message = {"role": "user", "content": texts[1]}
    requests = [
        ("/v1/completions", {**common, "prompt": texts[0], "allowed_token_ids": labels}),
        ("/v1/chat/completions", {**common, "messages": [message], **choice}),
        ("/generative_scoring", {"query": texts[2], "items": [" slow"], "label_token_ids": labels}),
    ]
    for path, body in requests:
        status, answer = post(server, path, body)
        assert status == 200, answer
    prompts[2] = [*prompts[2], *tokenizer.encode(" slow")]
    said = [
        {**common, "allowed_token_ids": labels},
        {**common, **choice},
        {**common, "temperature": 1, "logprob_token_ids": labels, "logprobs": len(labels)},
    ]
    for prompt, body in zip(prompts, said, strict=True):
        assert captured_bodies(captured, prompt) == [{**body, "prompt": prompt}]
    assert {path.stat().st_mode & 0o777 for path in captured.iterdir()} == {0o600}
    assert "users' data on disk" in server.log.read_text()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_that_asks_for_something_unknown_gets_a_400_with_the_reason(server, path):
    """Which of them are refused: `test_tasks`."""
    body = {"model": "model", "max_tokens": 1, "vllm_xargs": {"adainfer_policy": "weather"}}
    asked = {"prompt": "film"}
    if "chat" in path:
        asked = {"messages": [{"role": "user", "content": "film"}]}
    status, answer = post(server, path, {**body, **asked})
    assert status == 400
    assert "its policies are: mood, topic, next" in answer["error"]["message"]


def test_artifacts_are_read_again_by_a_post_and_damaged_ones_are_refused(
    server, tasks, sources, reference
):
    assert post(server, "/adainfer/reload", {})[0] == 200
    weights = Path(sources["mood"], "policy.safetensors")
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[: len(content) // 2])
        status, answer = post(server, "/adainfer/reload", {})
        assert status == 409
        assert "cannot be read" in answer["error"]["message"]
    finally:
        weights.write_bytes(content)
    wanted = cases(tasks, reference, prompts_of(42, 30), 42)
    assert answers(server, wanted) == [case.token for case in wanted]


def test_the_log_says_what_is_active_and_at_each_interval_what_was_saved(server, tasks, reference):
    answers(server, cases(tasks, reference, prompts_of(9, 3), 9))
    saved = re.compile(r"Engine 000: mean exit layer \d\.\d/6, layers saved \d+%, probes \d")
    wait_for(lambda: saved.search(server.log.read_text()))
    log = server.log.read_text()
    assert "AdaInfer is on: policy mood, label-head probe after layers 2, 3 of 6" in log
    assert "AdaInfer is on: policy next, lens probe after layers 2, 5 of 6" in log


@pytest.mark.full
def test_replicas_count_and_capture_each_for_itself_behind_several_frontends(
    tiny_model, tasks, sources, reference, tmp_path
):
    flags = (*FLAGS, "--data-parallel-size", "2", "--api-server-count", "2")
    cores = sorted(os.sched_getaffinity(0))  # one beside another worker, which keeps its core busy
    more = environment(VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}")
    capture = {"directory": str(tmp_path / "requests"), "rate": 1}
    switch = {"artifact": sources, "min_rows_saved": 1, "capture": capture}
    with serving(str(tiny_model), switch, tmp_path / "log", flags, more) as running:
        wanted = cases(tasks, reference, prompts_of(43, 60), 43)
        assert answers(running, wanted) == [case.token for case in wanted]
        wait_for_counters(running, len(wanted))
        decided = running.metrics("adainfer:exit_layer_count")
        engines = Counter[str]()
        for series, value in decided.items():
            engines[series.split('engine="')[1][0]] += int(value)
        assert set(engines) == {"0", "1"}
        assert sum(engines.values()) == len(wanted)
    prompts = Counter[str]()
    for engine in engines:
        [path] = (tmp_path / "requests").glob(f"capture-{engine}-*.jsonl")
        lines = path.read_text().splitlines()
        assert len(lines) == engines[engine]
        prompts.update(str(json.loads(line)["body"]["prompt"]) for line in lines)
    assert prompts == Counter(str(case.prompt) for case in wanted)


def run(command: str, policies: dict[str, str], *arguments: str) -> str:
    """What a command of vLLM with policies prints."""
    given = [f"--policy={name}={directory}" for name, directory in policies.items()]
    ended = subprocess.run(
        [sys.executable, "-m", "vllm_adainfer.cli", command, *given, *arguments],
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout + ended.stderr


def test_run_batch_takes_the_same_policies(tiny_model, tasks, sources, reference, tmp_path):
    wanted = cases(tasks, reference, prompts_of(44, 30), 44)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lines = []
    for number, case in enumerate(wanted):
        body = {**completion(case), "model": str(tiny_model)}
        body["messages"] = [{"role": "user", "content": tokenizer.decode(body.pop("prompt"))}]
        url = "/v1/chat/completions"
        lines.append({"custom_id": str(number), "method": "POST", "url": url, "body": body})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    switch = json.dumps({"adainfer": {"min_rows_saved": 1}})
    said = run(
        "run-batch", sources, "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"),
        "--model", str(tiny_model), "--additional-config", switch, *FLAGS,
    )  # fmt: skip
    assert "AdaInfer is on" in said
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    bodies = {one["custom_id"]: one["response"]["body"] for one in found}
    answered = [bodies[str(number)] for number in range(len(wanted))]
    assert [b["usage"]["prompt_tokens"] for b in answered] == [len(c.prompt) for c in wanted]
    assert [b["choices"][0]["token_ids"][0] for b in answered] == [c.token for c in wanted]
