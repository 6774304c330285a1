"""Decisions over HTTP on the multimodal Qwen 3.5 with text alone, in bfloat16, as it is served."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.common.server import Server, serving
from tests.e2e.oracle import hidden_states
from tests.e2e.test_families import transformers_model
from tests.e2e.test_label_endpoints import (
    LABELS,
    POOL,
    PROMISES,
    QUESTIONS,
    STATES,
    TEMPLATE,
    counted_at_rest,
    label_tokenizer,
    left_by,
    post_all,
    prompts_of,
)
from tests.e2e.test_serve import environment, post, wait_for_counters
from tests.families import tiny_checkpoint
from tests.tiny import EXIT_POINTS, served_fingerprint, tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer.artifact.fields import Label

# Its layers are in `test_recurrent`, its requests in `test_label_endpoints`.
pytestmark = pytest.mark.full
FLAGS = (
    "--dtype", "bfloat16", "--language-model-only", "--enforce-eager", "--max-model-len", "512",
    "--chat-template", TEMPLATE,
)  # fmt: skip
ROUNDING = 0.02  # of a probability, from states in bfloat16
PICTURE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
PICTURE += "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return label_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("served") / "model"
    tiny_checkpoint("qwen3.5-multimodal", directory, len(tokenizer))
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def promises(tokenizer, model) -> dict[str, Any]:
    """Of a policy with which every question about its labels leaves at the first exit point."""
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in POOL}
    return {
        **PROMISES,
        "architecture": "Qwen3_5ForConditionalGeneration",
        "labels": tuple(Label(name=name, token_id=token) for name, token in names.items()),
        "vocab_size": len(tokenizer),
        "weights_fingerprint": served_fingerprint(model, "bfloat16"),
    }


@pytest.fixture(scope="module")
def server(model, promises, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    artifact = tiny_artifact(model, folder / "policy", **promises)
    switch = {"artifact": str(artifact), "min_rows_saved": 1}
    with serving(str(model), switch, folder / "log", FLAGS, environment()) as running:
        yield running


def test_decisions_leave_early_beside_text_and_a_picture_is_refused(server, model, promises):
    tokenizer = AutoTokenizer.from_pretrained(model)  # Qwen's own, by the model's type
    reference = transformers_model(model)
    heads = tiny_tensors(tiny_config(model, **promises))
    layer = EXIT_POINTS[0]
    pool = [label.token_id for label in promises["labels"]]
    decided, before = counted_at_rest(server), left_by(server)
    bodies = [{"state": state, "questions": QUESTIONS} for state in STATES]
    text = {"model": "model", "prompt": STATES[0], "max_tokens": 20, "ignore_eos": True}
    look = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "a"}]
    picture = {"model": "model", "messages": [{"role": "user", "content": look}]}
    with ThreadPoolExecutor(3) as others:
        texts = others.submit(post_all, server, "/v1/completions", [text] * 4)
        refused = others.submit(post, server, "/v1/chat/completions", picture)
        answers = post_all(server, "/v1/systemone", bodies)
    assert refused.result()[0] == 400
    assert [one["usage"]["completion_tokens"] for one in texts.result()] == [20] * 4
    for body, answer in zip(bodies, answers, strict=True):
        prompts = prompts_of(tokenizer, "/v1/systemone", body)
        for name, prompt in zip(QUESTIONS, prompts, strict=True):
            own = tokenizer.convert_tokens_to_ids(LABELS[name])
            if not set(own) <= set(pool):
                continue
            state = hidden_states(reference, prompt)[layer][-1]
            scores = heads[f"exit.{layer}.head_weight"] @ state + heads[f"exit.{layer}.head_bias"]
            expected = scores[[pool.index(label) for label in own]].softmax(0)
            told = answer["answers"][name]["probabilities"]
            assert list(told.values()) == pytest.approx(expected.tolist(), abs=ROUNDING)
    wait_for_counters(server, decided + len(QUESTIONS) * len(STATES) + 4 * 20)
    left = left_by(server) - before
    in_pool = [name for name, labels in LABELS.items() if set(labels) <= set(POOL)]
    assert left[layer] == len(in_pool) * len(STATES)
