"""Which requests are captured, and what a line says of them."""

from __future__ import annotations

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from tests.running import vllm_request
from vllm_adainfer.drafts.schemas import LONGEST_SCHEMA
from vllm_adainfer.engine.admission import traffic_sample as sample
from vllm_adainfer.engine.admission.traffic_sample import in_traffic_sample
from vllm_adainfer.engine.compat.requests import request_group
from vllm_adainfer.engine.scheduler.capture import batch_line, body_of, line_of
from vllm_adainfer.engine.startup.banner import capture_notice
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Capture, Settings, read_settings

PROMPT = [3, 1, 4]


def test_a_line_is_one_of_vllms_batch_files_and_keeps_what_came_together():
    alone = {"custom_id": "7", "method": "POST", "url": "/v1/completions", "body": {"prompt": [7]}}
    assert batch_line("7", "/v1/completions", {"prompt": [7]}, None) == alone
    together = batch_line("7", "/v1/completions", {"prompt": [7]}, "decision-7")
    assert together == {**alone, "group": "decision-7"}


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, {}),
        ({"max_tokens": 64}, {"max_tokens": 64}),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 1}, {"temperature": 0.7}),
        ({"allowed_token_ids": [7, 8]}, {"allowed_token_ids": [7, 8]}),
        ({"logprobs": 5}, {"logprobs": 5}),
        ({"logprob_token_ids": [7, 8]}, {"logprob_token_ids": [7, 8], "logprobs": 2}),
        ({"presence_penalty": 1.0}, {}),
        (
            {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
            {"structured_outputs": {"choice": ["yes", "no"]}},
        ),
        (
            {"structured_outputs": StructuredOutputsParams(json={"const": 1}), "max_tokens": 9},
            {"structured_outputs": {"json": {"const": 1}}, "max_tokens": 9},
        ),
    ],
    ids=lambda value: "-".join(value) or "plain",
)
def test_a_line_says_all_that_decides_an_answer(params, said):
    body = body_of(
        vllm_request("id", SamplingParams(**{"temperature": 0, "max_tokens": 1, **params})), "m"
    )
    assert body == {"model": "m", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, **said}


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [7, 8]},
        {"logprob_token_ids": [7, 8], "logprobs": 2},
        {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
        {"structured_outputs": StructuredOutputsParams(json={"type": "object"})},
    ],
    ids=lambda params: next(iter(params)),
)
def test_vllm_reads_a_body_as_the_request_that_was_sent(params):
    sent = SamplingParams(temperature=0, max_tokens=1, **params)
    body = CompletionRequest.model_validate(body_of(vllm_request("id", sent), "m"))
    assert body.prompt == PROMPT
    read = body.to_sampling_params(1, {})
    for field in "temperature", "max_tokens", "allowed_token_ids", "logprob_token_ids":
        assert getattr(read, field) == getattr(sent, field)
    assert read.num_logprobs == sent.num_logprobs
    assert read.structured_outputs == sent.structured_outputs


@pytest.mark.parametrize(
    "params",
    [
        {"prompt_logprobs": 1},
        {"min_tokens": 1},
        {"logit_bias": {7: 1.0}},
        {"bad_words": ["no"]},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 1.0, "max_tokens": 2},
        {"frequency_penalty": 1.0, "max_tokens": 2},
        {"thinking_token_budget": 5},
        {"structured_outputs": StructuredOutputsParams(regex="a|b")},
        {"structured_outputs": StructuredOutputsParams(json_object=True)},
        {"structured_outputs": StructuredOutputsParams(json={"title": "x" * LONGEST_SCHEMA})},
    ],
    ids=lambda params: next(iter(params)),
)
def test_a_request_that_a_line_would_tell_wrongly_is_left_out(params):
    assert body_of(vllm_request("id", SamplingParams(**{"max_tokens": 1, **params})), "m") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_embeds": [[0.0]] * 3},
        {"prompt_token_ids": None, "prompt_embeds": [[0.0]] * 3},
        {"mm_features": [object()]},
        {"lora_request": object()},
        {"resumable": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_prompt_that_is_not_its_token_ids_alone_is_left_out(changes):
    assert line_of(vllm_request(**changes), "m") is None


def test_a_request_to_a_classifier_is_the_same_request_of_classify():
    url, body = line_of(vllm_request(params=PoolingParams(task="classify")), "m")
    sent = ClassificationCompletionRequest.model_validate(body)
    assert (url, sent.input) == ("/classify", PROMPT)
    assert sent.to_pooling_params() == PoolingParams(task="classify")


@pytest.mark.parametrize(
    "params", [{"task": "embed"}, {"task": "classify", "use_activation": False}]
)
def test_embeddings_and_raw_scores_are_left_out(params):
    assert line_of(vllm_request(params=PoolingParams(**params)), "m") is None


def test_choices_are_read_back_from_the_grammar_that_vllm_puts_in_their_place():
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a | b", 'say "x"']))
    validate_xgrammar_grammar(params)
    assert params.structured_outputs is not None
    assert params.structured_outputs.choice is None
    body = body_of(vllm_request("id", params), "m")
    assert body is not None
    assert body["structured_outputs"] == {"choice": ["a | b", 'say "x"']}


@pytest.mark.parametrize(
    ("request_id", "group"),
    [
        ("decision-abc-0", "decision-abc"),
        ("decision-abc-12-0123abcd", "decision-abc"),
        ("generative-scoring-a-b-3-0123abcd", "generative-scoring-a-b"),
        ("cmpl-abc-0-0123abcd", "cmpl-abc"),
        ("chatcmpl-abc-0123abcd", None),
        ("chatcmpl-abc-7", None),
        ("17", None),
        ("17-0123abcd", None),
        ("decision-abc", None),
        ("", None),
    ],
)
def test_the_parts_of_one_http_request_are_a_group(request_id, group):
    assert request_group(request_id) == group


def test_shadow_requests_and_captured_ones_are_drawn_independently(monkeypatch):
    monkeypatch.setattr(sample, "SECRET", b"the same in each run")
    ids = [str(number) for number in range(10_000)]
    both = sum(
        in_traffic_sample(i, 0.3, "capture") and in_traffic_sample(i, 0.3, "shadow") for i in ids
    )
    assert abs(both - 900) < 3 * 900**0.5


def test_at_start_the_log_says_what_is_kept_where_and_that_it_is_users_data():
    text = capture_notice(Capture(directory="/data/requests", rate=0.25, limit=500))
    assert "captures 0.25 of the requests, the latest 500 of each engine, in /data" in text
    assert "users' data on disk" in text


@pytest.mark.parametrize(
    ("adainfer", "sentence"),
    [
        ({"capture": "here"}, "adainfer.capture: .*dictionary"),
        ({"capture": {}}, "adainfer.capture.directory: Field required"),
        ({"capture": {"directory": ""}}, "adainfer.capture.directory: .* at least 1 character"),
        ({"capture": {"directory": "d", "rate": 0}}, "capture.rate: .* greater than 0"),
        ({"capture": {"directory": "d", "rate": 1.1}}, "capture.rate: .* less than or equal to 1"),
        ({"capture": {"directory": "d", "limit": 0}}, "capture.limit: .* greater than or equal to"),
        (
            {"capture": {"directory": "d", "share": 1}},
            "adainfer.capture.share is not a known key; known keys: directory, limit, rate",
        ),
        ({"capture": {"directory": "d"}, "record": [2]}, '"capture" goes with "artifact" or'),
        ({"capture": {"directory": "d"}, "exit_script": [2]}, '"capture" goes with "artifact" or'),
        ({"capture": {"directory": "d"}, "epsilon": 0.1}, '"epsilon" goes with "artifact": give'),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_right(adainfer, sentence):
    with pytest.raises(AdaInferError, match=sentence):
        read_settings({"adainfer": adainfer})


@pytest.mark.parametrize("more", [{}, {"artifact": "policy"}])
def test_capture_stands_alone_or_beside_an_artifact(more):
    settings = Settings.model_validate({"capture": {"directory": "d"}, **more})
    assert settings.capture == Capture(directory="d", rate=0.1, limit=2000)
    assert settings.runs_stock == (not more)
