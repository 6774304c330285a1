from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.score_labels import (
    is_classifier,
    score_head_of,
    score_labels,
)


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(architectures=["LlamaForSequenceClassification"], **changes)


@pytest.mark.parametrize(
    ("changes", "head", "names"),
    [
        ({"id2label": {0: "bad", 1: "fair", 2: "good"}}, "softmax", ["bad", "fair", "good"]),
        ({"num_labels": 2}, "softmax", ["LABEL_0", "LABEL_1"]),
        ({"num_labels": 1}, "sigmoid", ["no", "yes"]),
        (
            {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"},
            "sigmoid",
            ["no", "yes"],
        ),
        (
            {"classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True},
            "sigmoid",
            ["no", "yes"],
        ),
        (
            {"classifier_from_token": ["a", "b", "c"], "method": "no_post_processing"},
            "softmax",
            ["a", "b", "c"],
        ),
    ],
)
def test_labels_are_the_columns_of_the_scores(changes, head, names):
    hf_config = config(**changes)
    assert is_classifier(hf_config)
    assert score_head_of(hf_config) == head
    labels = score_labels(hf_config)
    assert [label.name for label in labels] == names
    assert [label.token_id for label in labels] == [*range(len(names))]


def test_a_model_that_generates_has_no_scores():
    hf_config = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert not is_classifier(hf_config)
    assert score_head_of(hf_config) is None


def test_columns_with_one_name_are_refused():
    with pytest.raises(AdaInferError, match="give each a name of its own in id2label"):
        score_labels(config(id2label={0: "good", 1: "good"}))
