"""Evaluation, metrics and refusals of policies for choices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny import tiny_config
from tests.unit.test_choice_policy import YES_NO
from vllm_adainfer.engine.admission.admission import why_choices_run_on
from vllm_adainfer.offline.evaluation.requests import chosen, request_params
from vllm_adainfer.settings.engine import Settings

CHOICES = YES_NO["choices"]


def test_an_evaluation_asks_for_the_choices_with_room_for_each_in_single_letters(
    tiny_model,
):
    config = tiny_config(tiny_model, **YES_NO)
    params: Any = request_params(config, None, {"adainfer_epsilon": 0.02})
    assert params.structured_outputs.choice == ["yes", "no"]
    assert (params.temperature, params.max_tokens) == (0, len("yes") + 1)
    assert params.extra_args == {"adainfer_epsilon": 0.02}


def test_answers_are_compared_as_texts_whatever_tokens_wrote_them():
    outputs: Any = [
        SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in ("no", "yes", "no")
    ]
    assert chosen(outputs, CHOICES) == [[20], [10, 11], [20]]


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({}, {}, None),
        ({}, {"backend": "xgrammar"}, None),
        ({"finish_choices": False}, {}, '"finish_choices" is off'),
        ({}, {"reasoning_parser": "qwen3"}, "after the reasoning"),
        ({}, {"backend": "outlines"}, "outlines cannot look ahead"),
        ({}, {"return_sampling_mask": True}, "sampling masks are returned"),
    ],
)
def test_why_choices_take_vllms_steps_is_said(settings, changes, reason):
    facts = {"backend": "auto", "reasoning_parser": "", "return_sampling_mask": False, **changes}
    config: Any = SimpleNamespace(
        structured_outputs_config=SimpleNamespace(**facts), model_config=SimpleNamespace(**facts)
    )
    found = why_choices_run_on(config, Settings(artifact="somewhere", **settings))
    assert (found is None) if reason is None else (reason in str(found))
