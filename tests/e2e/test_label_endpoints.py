"""`/v1/systemone` and `/generative_scoring` over HTTP answer what an exit has read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from server import Server, serving
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.e2e.oracle import hidden_states
from tests.e2e.test_probabilities import CLOSE, TIE, expected, read
from tests.e2e.test_serve import FLAGS, by_policy, environment, post, wait_for_counters
from tests.families import SHAPE
from tests.tiny import EXIT_POINTS, LAYERS, tiny_artifact, tiny_config, tiny_tensors, word_tokenizer
from vllm_adainfer.policy.artifact import Label

END = "Sentiment :"  # of each prompt, so that a label is a token of its own
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}" + END
PROMISES = {"risk": "probability", "tolerance": 0.05, "label_mass": True}
QUESTIONS = {
    "good": {"type": "noul", "instructions": "a good film ?"},
    "kind": {"type": "choice", "criteria": {"warm": None, "clever": None, "long": None}},
}
WORDS = ["a", "warm", "and", "clever", "film", "the", "plot", "is", "slow", "but", "never", "dull"]
_GENERATOR = np.random.default_rng(3)
STATES = [" ".join(_GENERATOR.choice(WORDS, 3 + i % 9)) for i in range(32)]


def rendered(state: str) -> str:
    """The yes-or-no question about a state, as vLLM asks it."""
    lines = ["Question: a good film ?", "yes", "no", "Answer with yes or no only."]
    return f"{state}\n\n" + "\n".join(lines) + f" {END}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models', and every label that the endpoint may ask for."""
    found = word_tokenizer()
    labels = ["yes", "no", *map(chr, range(ord("A"), ord("Z") + 1)), *"0123456789"]
    found.add_tokens([AddedToken(label, single_word=True) for label in labels])
    return found


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
    ids = [tokenizer.convert_tokens_to_ids(name) for name in ("yes", "no")]
    labels = tuple(Label(name=n, token_id=i) for n, i in zip(("yes", "no"), ids, strict=True))
    return {**PROMISES, "architecture": "Qwen3ForCausalLM", "labels": labels}


@pytest.fixture(scope="module")
def heads(model, promises) -> dict[int, tuple[Tensor, Tensor]]:
    tensors = tiny_tensors(tiny_config(model, **promises))
    return {
        layer: (tensors[f"exit.{layer}.head_weight"], tensors[f"exit.{layer}.head_bias"])
        for layer in EXIT_POINTS
    }


def states_of(reference: Any, tokenizer: Any, texts: list[str]) -> list[list[Tensor]]:
    """Of each text, its last row after each number of layers."""
    prompts = [tokenizer.encode(text) for text in texts]
    return [[state[-1:] for state in hidden_states(reference, prompt)] for prompt in prompts]


@pytest.fixture(scope="module")
def threshold(reference, tokenizer, heads) -> float:
    """On the gap: half of the prompts would leave at the first exit point."""
    gaps = []
    for after in states_of(reference, tokenizer, [rendered(state) for state in STATES]):
        best = read(after[EXIT_POINTS[0]], heads[EXIT_POINTS[0]])[0].sort().values
        gaps.append(float(best[-1] - best[-2]))
    return float(np.median(gaps))


@pytest.fixture(scope="module")
def server(model, promises, threshold, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    thresholds = torch.full((2, len(EXIT_POINTS)), threshold)
    artifact = tiny_artifact(model, folder / "policy", thresholds, **promises)
    flags = [TEMPLATE if "message" in flag else flag for flag in FLAGS]
    switch = {"artifact": str(artifact), "min_rows_saved": 1}
    with serving(str(model), switch, folder / "log", flags, environment()) as running:
        yield running


def post_all(server: Server, path: str, bodies: list[dict[str, Any]]) -> list[Any]:
    """The answers of requests that come together."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda body: post(server, path, body), bodies))
    assert [status for status, _ in found] == [200] * len(bodies), found
    return [answer for _, answer in found]


def left_by(server: Server) -> Counter[int]:
    """How many tokens have left after at most so many layers."""
    found: Counter[int] = Counter()
    for series, value in server.metrics("adainfer:exit_layer_bucket{").items():
        limit = series.split('le="')[1].split('"')[0]
        if limit != "+Inf":
            found[int(float(limit))] += int(value)
    return found


def test_a_decision_is_read_at_the_exit_beside_questions_that_run_at_full_depth(
    server, reference, tokenizer, heads, threshold, promises
):
    """Of each request one question has a policy; the other one, of three letters, has none."""
    decided, before = by_policy(server, "exit_layer_count").total(), left_by(server)
    bodies = [{"state": state, "questions": QUESTIONS} for state in STATES]
    answers = post_all(server, "/v1/systemone", bodies)
    ids = [label.token_id for label in promises["labels"]]
    wanted: Counter[int] = Counter()
    for after, answer in zip(
        states_of(reference, tokenizer, [rendered(state) for state in STATES]), answers, strict=True
    ):
        found = expected(reference, after, heads, threshold, ids)
        if found is None:
            continue
        depth, among, mass = found
        wanted[depth] += 1
        told, diagnostics = answer["answers"]["good"], answer["diagnostics"]["good"]
        assert list(told["probabilities"].values()) == pytest.approx(among.tolist(), abs=CLOSE)
        assert told["confidence"] == pytest.approx(float(among.max()) * mass, abs=CLOSE)
        assert diagnostics["label_mass"] == pytest.approx(mass, abs=CLOSE)
        if mass > 0.5 + TIE:
            assert diagnostics["argmax_is_label"]
    wait_for_counters(server, decided + 2 * len(STATES))
    left = left_by(server) - before
    assert wanted[EXIT_POINTS[0]] > len(STATES) // 4
    assert left[EXIT_POINTS[0]] >= wanted[EXIT_POINTS[0]]
    assert 0 < left[LAYERS - 1] <= len(STATES), "no question of three letters leaves early"


@pytest.mark.parametrize("among_labels", [True, False])
def test_a_score_is_the_probability_of_the_first_label_at_the_exit(
    server, reference, tokenizer, heads, threshold, promises, among_labels
):
    """Labels may come in another order than in the policy; the items of a request leave alone."""
    ids = [label.token_id for label in promises["labels"]]
    query = f"the plot is {among_labels} :"
    body = {
        "query": query,
        "items": [f" {state} {END}" for state in STATES],
        "label_token_ids": ids[::-1],
        "apply_softmax": among_labels,
    }
    decided = by_policy(server, "exit_layer_count").total()
    before = by_policy(server, "layer_rows_skipped_total")
    [answer] = post_all(server, "/generative_scoring", [body])
    scores = [one["score"] for one in answer["data"]]
    texts = [query + item for item in body["items"]]
    for after, score in zip(states_of(reference, tokenizer, texts), scores, strict=True):
        found = expected(reference, after, heads, threshold, ids)
        if found is None:
            continue
        _, among, mass = found
        wanted = float(among[1]) * (1 if among_labels else mass)
        assert score == pytest.approx(wanted, abs=CLOSE)
    wait_for_counters(server, decided + len(STATES))
    assert (by_policy(server, "layer_rows_skipped_total") - before).total() > 0


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
    decided = by_policy(server, "exit_layer_count").total()
    before = by_policy(server, "layer_rows_skipped_total")
    lists = [ids[0], ids[0]], [*ids, 3], ids[:1]
    for asked in lists:
        body = {"query": f"the film {json.dumps(asked)} {END}", "items": [""]}
        [answer] = post_all(server, "/generative_scoring", [{**body, "label_token_ids": asked}])
        assert 0 <= answer["data"][0]["score"] <= 1
    wait_for_counters(server, decided + len(lists))
    assert by_policy(server, "layer_rows_skipped_total") == before
