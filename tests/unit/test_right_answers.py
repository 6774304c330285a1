"""Which answers of an evaluation are right."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import LABELS, tiny_config, word_tokenizer
from tests.unit.test_choice_policy import YES_NO
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.prompts import right_answers

ANY_TOKEN: dict[str, Any] = {"probe": "lens", "candidates": "shortlist", "labels": ()}
TOKENIZER = word_tokenizer()


def right(
    config: Any, answers: list[str | None], texts: list[list[int]], max_tokens: int = 1, **more: Any
) -> list[bool] | None:
    examples = [Example("line", "a film", [1], answer, **more) for answer in answers]
    return right_answers(examples, config, TOKENIZER, max_tokens, texts)


def test_a_label_is_answered_by_its_token(tiny_model):
    config = tiny_config(tiny_model)
    first, second = ([token] for token in config.label_ids)
    assert right(config, list(LABELS), [first, second]) == [True, True]
    assert right(config, list(LABELS), [second, second]) == [False, True]


def test_the_label_of_a_request_is_the_right_token(tiny_model):
    config = tiny_config(tiny_model)
    assert right(config, ["7", "8"], [[7], [7]], labels=(7, 8)) == [True, False]


def test_a_choice_is_right_as_a_whole(tiny_model):
    config = tiny_config(tiny_model, **YES_NO)
    assert right(config, ["yes", "no"], [[10, 11], [10, 11]]) == [True, False]


def test_without_artifact_labels_the_first_token_of_the_rows_label_is_right(tiny_model):
    config = tiny_config(tiny_model, **ANY_TOKEN)
    [token] = TOKENIZER.encode("good")
    assert right(config, ["good", "bad"], [[token], [token]]) == [True, False]


@pytest.mark.parametrize(("label", "of"), [("good", None), ("1", [False])])
def test_a_generated_text_is_right_by_its_last_number_or_not_at_all(tiny_model, label, of):
    config = tiny_config(tiny_model, **ANY_TOKEN, max_tokens=4)
    assert right(config, [label], [TOKENIZER.encode("good film")], max_tokens=4) == of


def test_without_a_label_in_each_row_nothing_is_right_or_wrong(tiny_model):
    assert right(tiny_config(tiny_model), ["good", None], [[1], [1]]) is None
