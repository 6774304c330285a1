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
    """What turns the scores of a model into probabilities; None if it generates."""
    if not is_classifier(hf_config):
        return None
    return "sigmoid" if _columns(hf_config) == 1 else "softmax"


def score_labels(hf_config: Any) -> tuple[Label, ...]:
    """The labels of a classifier, by the names in its config.

    A single column, as rerankers have, gets the labels "no" and "yes": its sigmoid is the
    probability of "yes".

    Raises:
        AdaInferError: two columns have the same name.

    """
    columns = _columns(hf_config)
    names = [NO, YES] if columns == 1 else _names(hf_config)
    if len(set(names)) < len(names):
        raise AdaInferError(
            f"the classes of the model are named {', '.join(names)}: give each a name of its own "
            "in id2label of its config.json"
        )
    return tuple(Label(name=name, token_id=column) for column, name in enumerate(names))


def _columns(hf_config: Any) -> int:
    """Columns of the score head, as vLLM 0.32 counts them.

    `SequenceClassificationConfig` in `models/adapters.py`, and the hook for Qwen3 in
    `models/config.py`.
    """
    method = getattr(hf_config, "method", None)
    if method == "from_2_way_softmax" or getattr(hf_config, "is_original_qwen3_reranker", False):
        return 1
    tokens = getattr(hf_config, "classifier_from_token", None)
    return int(hf_config.num_labels) if tokens is None else len(tokens)


def _names(hf_config: Any) -> list[str]:
    tokens = getattr(hf_config, "classifier_from_token", None)
    if tokens is not None:
        return [str(token) for token in tokens]
    return [str(hf_config.id2label[column]) for column in range(int(hf_config.num_labels))]
