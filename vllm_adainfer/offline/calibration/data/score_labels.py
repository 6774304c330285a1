"""The labels of a classifier: the columns of its scores."""

from __future__ import annotations

from typing import Any

from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.artifact.kinds import ScoreHead
from vllm_adainfer.errors import AdaInferError

CLASSIFIER = "ForSequenceClassification"  # how the names of such architectures end
NO, YES = "no", "yes"  # the labels of a single column


def is_classifier(hf_config: Any) -> bool:
    """Whether vLLM runs a model of this Hugging Face config as a classifier."""
    return str(hf_config.architectures[0]).endswith(CLASSIFIER)


def score_head_of(hf_config: Any) -> ScoreHead | None:
    """The function from a model's scores to probabilities; None if it generates."""
    if not is_classifier(hf_config):
        return None
    if score_columns(hf_config) == 1:
        return "sigmoid"
    several = getattr(hf_config, "problem_type", None) == "multi_label_classification"
    return "sigmoids" if several else "softmax"


def score_labels(hf_config: Any) -> tuple[Label, ...]:
    """The labels of a classifier, by the names in its config.

    A single column, as rerankers have, gets the labels "no" and "yes": its sigmoid is the
    probability of "yes".

    An AdaInferError if two columns have the same name.
    """
    columns = score_columns(hf_config)
    names = [NO, YES] if columns == 1 else _names(hf_config)
    if len(set(names)) < len(names):
        raise AdaInferError(
            f"the classes of the model are named {', '.join(names)}: give each a name of its own "
            "in id2label of its config.json"
        )
    return tuple(Label(name=name, token_id=column) for column, name in enumerate(names))


def separates_texts(hf_config: Any) -> bool:
    """Whether vLLM puts the tokenizer's separator between query and document, if it has one.

    By default it does not for a classifier that it makes of tokens
    (`SequenceClassificationConfig` in `models/adapters.py`).
    """
    return bool(getattr(hf_config, "use_sep_token", _method(hf_config) is None))


def _method(hf_config: Any) -> str | None:
    """How vLLM 0.32 makes a score head of the LM head; None if the checkpoint has one.

    The original Qwen3-Reranker gets its way from a config hook (`models/config.py`).
    """
    if getattr(hf_config, "is_original_qwen3_reranker", False):
        return "from_2_way_softmax"
    method: str | None = getattr(hf_config, "method", None)
    return method


def score_columns(hf_config: Any) -> int:
    """Columns of the score head, as vLLM's `SequenceClassificationConfig` counts them."""
    if _method(hf_config) == "from_2_way_softmax":
        return 1
    tokens = getattr(hf_config, "classifier_from_token", None)
    return int(hf_config.num_labels) if tokens is None else len(tokens)


def _names(hf_config: Any) -> list[str]:
    tokens = getattr(hf_config, "classifier_from_token", None)
    if tokens is not None:
        return [str(token) for token in tokens]
    return [str(hf_config.id2label[column]) for column in range(int(hf_config.num_labels))]
