"""`/v1/systemone` and `/generative_scoring` over HTTP answer what an exit has read."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common.server import Server, serving
from tests.e2e.oracle import last_states
from tests.e2e.test_label_pool import CLOSE, TIE, expected
from tests.e2e.test_serve import FLAGS, by_policy, environment, post, wait_for_counters
from tests.families import SHAPE
from tests.tiny import EXIT_POINTS, LAYERS, tiny_artifact, tiny_config, tiny_tensors, word_tokenizer
from tests.waiting import wait_for
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.exits.accounting.report import INTERVAL
from vllm_adainfer.offline.calibration.data.batch_files import read_requests
from vllm_adainfer.offline.calibration.data.examples import Row, read_rows

END = "Sentiment :"  # of each prompt, so that a label is a token of its own
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}" + END
POOL = ["yes", "no", *map(chr, range(ord("A"), ord("Z") + 1))]
PROMISES = {"risk": "probability", "tolerance": 0.05, "label_mass": True, "label_pool": True}
QUESTIONS = {
    "good": {"type": "noul", "instructions": "a good film ?"},
    "kind": {"type": "choice", "criteria": {"warm": None, "clever": None, "long": None}},
    "how": {"type": "score", "criteria": ["not", "a bit", "much"]},
}
LABELS = {"good": ["yes", "no"], "kind": ["A", "B", "C"], "how": ["0", "1", "2"]}
WORDS = ["a", "warm", "and", "clever", "film", "the", "plot", "is", "slow", "but", "never", "dull"]
_GENERATOR = np.random.default_rng(3)
STATES = [" ".join(_GENERATOR.choice(WORDS, 3 + i % 9)) for i in range(32)]


def label_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models', and every label that the endpoint may ask for."""
    found = word_tokenizer()
    found.add_tokens([AddedToken(label, single_word=True) for label in [*POOL, *"0123456789"]])
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return label_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, head_dim=32, vocab_size=len(tokenizer))
    config.architectures = ["Qwen3ForCausalLM"]
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reference(model) -> Any:
    return Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def promises(tokenizer) -> dict[str, Any]:
    labels = tuple(
        Label(name=name, token_id=tokenizer.convert_tokens_to_ids(name)) for name in POOL
    )
    return {**PROMISES, "architecture": "Qwen3ForCausalLM", "labels": labels}


@pytest.fixture(scope="module")
def heads(model, promises) -> dict[str, Tensor]:
    return tiny_tensors(tiny_config(model, **promises))


def prompts_of(tokenizer: Any, path: str, body: dict[str, Any]) -> list[list[int]]:
    """What `calibrate` makes of a request."""
    row = Row("here", {"url": path, "body": body})
    examples = read_requests([row], tokenizer, len(tokenizer), 512)
    return [example.token_ids for example in examples]


@pytest.fixture(scope="module")
def threshold(reference, tokenizer, heads) -> float:
    """On the gap: half of the yes-or-no questions would leave at the first exit point."""
    layer, gaps = EXIT_POINTS[0], []
    for state in STATES:
        prompt, *_ = prompts_of(
            tokenizer, "/v1/systemone", {"state": state, "questions": QUESTIONS}
        )
        [after] = last_states(reference, [prompt])
        scores = after[layer] @ heads[f"exit.{layer}.head_weight"].T
        best = (scores + heads[f"exit.{layer}.head_bias"])[0, :2].softmax(0)
        gaps.append(float((best[0] - best[1]).abs()))
    return float(np.median(gaps))


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("captured")
    return directory


@pytest.fixture(scope="module")
def server(model, promises, threshold, captured, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    thresholds = torch.full((2, len(EXIT_POINTS)), threshold)
    artifact = tiny_artifact(model, folder / "policy", thresholds, **promises)
    flags = [TEMPLATE if "message" in flag else flag for flag in FLAGS]
    capture = {"directory": str(captured), "rate": 1}
    switch = {"artifact": str(artifact), "min_rows_saved": 1, "capture": capture}
    with serving(str(model), switch, folder / "log", flags, environment()) as running:
        yield running


def post_all(server: Server, path: str, bodies: list[dict[str, Any]]) -> list[Any]:
    """The answers of requests that come together."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda body: post(server, path, body), bodies))
    assert [status for status, _ in found] == [200] * len(bodies), found
    return [answer for _, answer in found]


def counted_at_rest(server: Server) -> int:
    """How many tokens are counted, once those of earlier tests are."""
    before, now = -1, int(by_policy(server, "exit_layer_count").total())
    while now != before:
        time.sleep(2 * INTERVAL)
        before, now = now, int(by_policy(server, "exit_layer_count").total())
    return now


def left_by(server: Server) -> Counter[int]:
    """How many tokens have left after at most so many layers."""
    found: Counter[int] = Counter()
    for series, value in server.metrics("adainfer:exit_layer_bucket{").items():
        limit = series.split('le="')[1].split('"')[0]
        if limit != "+Inf":
            found[int(float(limit))] += int(value)
    return found


def test_a_decision_is_read_at_the_exit_among_the_labels_of_its_question(
    server, reference, tokenizer, heads, threshold, promises
):
    """Yes or no, and three letters, are in the policy's pool; three digits are not."""
    decided, before = counted_at_rest(server), left_by(server)
    bodies = [{"state": state, "questions": QUESTIONS} for state in STATES]
    answers = post_all(server, "/v1/systemone", bodies)
    pool = [label.token_id for label in promises["labels"]]
    wanted: Counter[int] = Counter()
    for body, answer in zip(bodies, answers, strict=True):
        prompts = prompts_of(tokenizer, "/v1/systemone", body)
        assert answer["usage"]["input_tokens"] == sum(map(len, prompts))
        for name, after in zip(QUESTIONS, last_states(reference, prompts), strict=True):
            own = tokenizer.convert_tokens_to_ids(LABELS[name])
            tensors = None if name == "how" else heads
            found = expected(reference, after, tensors, own, pool, threshold)
            if found is None:
                continue
            depth, among, mass = found
            wanted[depth] += 1
            told, diagnostics = answer["answers"][name], answer["diagnostics"][name]
            assert list(told["probabilities"].values()) == pytest.approx(among.tolist(), abs=CLOSE)
            assert told["confidence"] == pytest.approx(float(among.max()) * mass, abs=CLOSE)
            assert diagnostics["label_mass"] == pytest.approx(mass, abs=CLOSE)
            if mass > 0.5 + TIE:
                assert diagnostics["argmax_is_label"]
    wait_for_counters(server, decided + len(QUESTIONS) * len(STATES))
    left = left_by(server) - before
    assert wanted[EXIT_POINTS[0]] > len(STATES) // 4
    assert left[EXIT_POINTS[0]] >= wanted[EXIT_POINTS[0]]
    assert 0 < left[LAYERS - 1] <= 2 * len(STATES), "no question of three digits leaves early"


@pytest.mark.parametrize(
    ("path", "asked", "parts"),
    [
        ("/v1/systemone", {"questions": QUESTIONS}, len(QUESTIONS)),
        ("/generative_scoring", {"items": [" warm", " long"]}, 2),
        ("/v1/completions", {"max_tokens": 1}, 2),
    ],
)
def test_captured_parts_of_a_request_stay_a_group_when_calibration_reads_them(
    server, captured, tokenizer, path, asked, parts
):
    labels = tokenizer.convert_tokens_to_ids(["yes", "no"])
    states = [f"{state} {path.strip('/')} {number}" for number, state in enumerate(STATES[:2])]
    body = {
        "/v1/systemone": lambda state: {"state": state},
        "/generative_scoring": lambda state: {"query": state, "label_token_ids": labels},
        "/v1/completions": lambda state: {
            "model": "model", "prompt": [state, f"{state} dull"], "allowed_token_ids": labels
        },
    }[path]  # fmt: skip
    bodies = [{**body(state), **asked} for state in states]
    post_all(server, path, bodies)
    wanted = [prompts_of(tokenizer, path, one) for one in bodies]

    def groups() -> list[set[str | None]]:
        """Of the prompts of each request."""
        examples = read_requests(read_rows(captured), tokenizer, len(tokenizer), 512)
        of = {tuple(example.token_ids): example.group for example in examples}
        return [{of.get(tuple(prompt)) for prompt in prompts} for prompts in wanted]

    wait_for(lambda: not any(None in found for found in groups()))
    assert [len(prompts) for prompts in wanted] == [parts, parts]
    [first], [second] = groups()
    assert None not in (first, second)
    assert first != second


@pytest.mark.parametrize("among_labels", [True, False])
def test_a_score_is_the_probability_of_the_first_label_at_the_exit(
    server, reference, tokenizer, heads, threshold, promises, among_labels
):
    """Labels come in any order; the items of a request leave one by one."""
    own = tokenizer.convert_tokens_to_ids(["no", "C", "yes"])
    body = {
        "query": f"the plot is {among_labels} :",
        "items": [f" {state} {END}" for state in STATES],
        "label_token_ids": own,
        "apply_softmax": among_labels,
    }
    decided = counted_at_rest(server)
    before = by_policy(server, "layer_rows_skipped_total")
    [answer] = post_all(server, "/generative_scoring", [body])
    pool = [label.token_id for label in promises["labels"]]
    prompts = prompts_of(tokenizer, "/generative_scoring", body)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    scores = [one["score"] for one in answer["data"]]
    for after, score in zip(last_states(reference, prompts), scores, strict=True):
        found = expected(reference, after, heads, own, pool, threshold)
        if found is None:
            continue
        _, among, mass = found
        assert score == pytest.approx(float(among[0]) * (1 if among_labels else mass), abs=CLOSE)
    wait_for_counters(server, decided + len(STATES))
    assert (by_policy(server, "layer_rows_skipped_total") - before).total() > 0


MESSAGES = [
    {"role": "system", "content": "the film is warm"},
    {"role": "user", "content": [{"type": "text", "text": text} for text in ("a plot", "good ?")]},
]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": f"a warm film {END}", "logprobs": 2}),
        ("/v1/completions", {"prompt": [5, 6, 7, 3], "logprobs": 2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True}),
        ("/v1/chat/completions", {"messages": MESSAGES[1:], "logprobs": True}),
    ],
)
def test_calibration_reads_the_tokens_that_the_server_reads(server, tokenizer, path, body):
    own = tokenizer.convert_tokens_to_ids(["A", "B"])
    asked = {"model": "model", "max_tokens": 1, "logprob_token_ids": own, **body}
    [answer] = post_all(server, path, [{**asked, "return_token_ids": True}])
    found = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
    assert prompts_of(tokenizer, path, asked) == [found]


BAD = {
    "/v1/systemone": [
        {"state": "film"},
        {"state": "film", "questions": {}},
        {"state": "film", "questions": {"q": {"type": "riddle"}}},
        {"state": "film", "questions": {"q": {"type": "choice", "criteria": {}}}},
        {"state": "film", "questions": {"q": {"type": "noul", "vllm_xargs": {"adainfer": 0}}}},
    ],
    "/generative_scoring": [
        {"query": "film", "items": [], "label_token_ids": [1, 2]},
        {"query": "film", "items": [""], "label_token_ids": []},
        {"query": "film", "items": [""], "label_token_ids": [1, 1 << 40]},
        {"query": "film", "items": [""], "label_token_ids": [-1]},
        {"query": "film", "items": [[1], "mixed"], "label_token_ids": [1, 2]},
    ],
}


@pytest.mark.parametrize("path", BAD)
def test_a_request_that_vllm_refuses_is_refused_and_others_are_answered(server, path):
    for body in BAD[path]:
        status, answer = post(server, path, body)
        assert status in (400, 422), answer
    fine = {"state": "film", "questions": QUESTIONS}
    [answer] = post_all(server, "/v1/systemone", [fine])
    assert set(answer["answers"]) == set(QUESTIONS)


def test_labels_that_come_twice_or_among_others_get_probabilities_of_full_depth(server, promises):
    ids = [label.token_id for label in promises["labels"]]
    decided = counted_at_rest(server)
    before = by_policy(server, "layer_rows_skipped_total")
    lists = [ids[0], ids[0]], [*ids[:2], 3], ids[:1]
    for asked in lists:
        body = {"query": f"the film {json.dumps(asked)} {END}", "items": [""]}
        [answer] = post_all(server, "/generative_scoring", [{**body, "label_token_ids": asked}])
        assert 0 <= answer["data"][0]["score"] <= 1
    wait_for_counters(server, decided + len(lists))
    assert by_policy(server, "layer_rows_skipped_total") == before
