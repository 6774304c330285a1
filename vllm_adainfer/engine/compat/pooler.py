"""The pooler of a classifier, which vLLM runs as a pooling model."""

from __future__ import annotations

from typing import Any


def is_classifier(model: Any) -> bool:
    """Whether vLLM has made a model a pooling model; ours are asked for classes alone."""
    from vllm.model_executor.models.interfaces_base import is_pooling_model

    return bool(is_pooling_model(model))


def activation_of(model: Any) -> str | None:
    """The activation of a classifier's scores: "classes" or "labels"; None for anything else.

    vLLM 0.32 keeps the function in the head of the pooler (`pooler/seqwise/heads.py`). For classes
    it is a softmax, or the sigmoid of a single column, for labels a sigmoid of each column. Others
    are for regression, or a module's own.
    """
    from vllm.model_executor.layers.pooler.activations import (
        PoolerClassify,
        PoolerMultiLabelClassify,
    )

    head: Any = model.pooler.poolers_by_task["classify"].head
    if isinstance(head.activation, PoolerClassify):
        return "classes"
    return "labels" if isinstance(head.activation, PoolerMultiLabelClassify) else None


def classify_with(model: Any, score: Any) -> None:
    """Let the pooler of a classifier call `score` in place of its score layer, and nothing else.

    vLLM 0.32 also lets clients ask a classifier for the classes of each token; an engine refuses
    tasks that its pooler does not have.
    """
    from vllm.model_executor.layers.pooler import DispatchPooler

    model.pooler = DispatchPooler({"classify": model.pooler.poolers_by_task["classify"]})
    model.pooler.replace_classifier(score)
