from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.objects import object_config
from tests.tiny import LAYERS, word_tokenizer
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.offline.doctor import smoke
from vllm_adainfer.offline.doctor.smoke import (
    SENTENCES,
    examine_engine,
    exits_found,
    full_depth_found,
    self_test_found,
    smoke_examples,
)
from vllm_adainfer.offline.evaluation.run import Run


def ran(left: dict[int, int], answers: str | None = None, skipped: int = 0) -> Run:
    texts = [[ord(answer)] for answer in answers or "a" * sum(left.values())]
    return Run(1, texts, layers_run=100 - skipped, layers_possible=100, exit_histogram=left)


@pytest.mark.parametrize(("longest", "words"), [(100, None), (8, 5)], ids=["all", "cut"])
def test_the_prompts_are_ones_that_the_policy_serves(longest, words):
    shared, tokenizer = SharedTokens(start=(1, 2), end=(3,)), word_tokenizer()
    examples = smoke_examples(shared, tokenizer, longest)
    assert [example.token_ids for example in examples] == [
        [1, 2, *tokenizer.encode(line)[:words], 3] for line in SENTENCES
    ]


@pytest.mark.parametrize(
    ("left", "answers", "sentence"),
    [
        (
            {2: 4, 5: 1, 6: 1},
            "aaabaa",
            "exits: 5 of 6 short requests exited, after layers 2 (4), 5 (1) of 6; 5 of 6 "
            "answers are the same as at full depth",
        ),
        ({3: 2}, "aa", "2 of 2 short requests exited, after layers 3 (2) of 6; 2 of 2"),
        ({6: 3}, None, "none of 3 short requests exited; they are unlike the prompts of the"),
    ],
)
def test_who_left_where_and_how_many_answers_changed_is_told(left, answers, sentence):
    full = ran({LAYERS: sum(left.values())})
    found = exits_found(ran(left, answers), full, LAYERS)
    assert found.state == "ok"
    assert sentence in found.sentence


@pytest.mark.parametrize(
    ("left", "skipped", "state", "sentence"),
    [
        ({6: 4}, 0, "ok", 'full depth: 4 of 4 requests with "adainfer": 0 ran all 6 layers'),
        ({6: 3, 2: 1}, 40, "FAIL", "full depth: only 3 of 4 requests with"),
        ({6: 4}, 1, "FAIL", "please report this with the output above"),
    ],
)
def test_requests_that_may_not_exit_have_to_run_every_layer(left, skipped, state, sentence):
    found = full_depth_found(ran(left, skipped=skipped), LAYERS)
    assert found.state == state
    assert sentence in found.sentence


def test_what_the_self_test_has_switched_off_is_a_failure_with_its_name():
    assert str(self_test_found([], "")).startswith("ok    self-test: kernels, exits and graphs")
    found = str(self_test_found(["segment_graphs", "exits"], ""))
    assert found.startswith("FAIL  self-test: segment_graphs, exits gave wrong results")


@pytest.mark.parametrize("failed", [[], ["kernels"]])
def test_what_the_self_test_could_not_test_is_told_as_such(failed):
    found = self_test_found(failed, "there is no room")
    assert found.state == ("FAIL" if failed else "skip")
    assert "not tested: there is no room" in found.sentence


def test_without_the_schema_of_its_objects_no_request_can_be_tried(monkeypatch, tiny_model):
    monkeypatch.setattr(smoke, "load_details", lambda _: {})
    model: Any = SimpleNamespace(
        tokenizer=word_tokenizer(), longest_prompt=lambda tokens: 512 - tokens
    )
    [found] = examine_engine(model, "policy", object_config(tiny_model))
    assert found.failed
    assert "no schema in its calibration.json" in found.sentence
