"""The score head of a classifier, which vLLM runs as a pooling model.

vLLM 0.32 makes a classifier of any causal model, ours included: `as_seq_cls_model` in
`models/adapters.py` puts a linear layer, `score`, in the LM head's place, and the pooler applies it
to the state of each prompt's last token, then an activation. Scores of requests that left early go
in between the two, so that whatever vLLM does with scores happens to them, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from adainfer_kernels import Head
from torch import Tensor, nn

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.kinds import ScoreHead
from vllm_adainfer.engine.compat.pooler import activation_of, classify_with, is_classifier
from vllm_adainfer.engine.runner.ranks import broadcast_from_rank0
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.loop import StepOutput
from vllm_adainfer.exits.loop.shadow import Judgement
from vllm_adainfer.transfers import upload


class EarlyScoreHead(nn.Module):
    """Stands in for a classifier's score layer in its pooler."""

    def __init__(
        self,
        score: nn.Module,
        take_output: Callable[[], StepOutput | None],
        judge_later: Callable[[Judgement], None],
    ) -> None:
        """`take_output` returns what the step answered early; None for a warm-up.

        `judge_later` gets the comparisons of shadow requests.

        vLLM's `score` stays a part of the model, and must not become one twice.
        """
        super().__init__()
        self._score: Callable[[Tensor], Tensor] = lambda states: score(states)
        self._take_output, self._judge_later = take_output, judge_later

    def forward(self, states: Tensor) -> Tensor:
        """Scores [requests, columns] from the states of their last tokens, [requests, hidden size].

        The states of requests that left early mean nothing.
        """
        scores, output = self._score(states), self._take_output()
        if output is None:
            return scores
        for shadow in output.shadows:
            self._judge_later(shadow.compare(as_labels(scores), self._score))
        for requests, answers in output.scored:
            answers = replace(answers, values=broadcast_from_rank0(answers.values))
            [places] = upload([requests], scores.device)
            early = answers.scores.to(scores.dtype)
            if scores.shape[1] == 1:
                scores[places, 0] = early[:, 1] - early[:, 0]
            else:
                scores[places] = early
        return scores


def as_labels(scores: Tensor) -> Tensor:
    """Scores [rows, columns] with a column for each label of a policy.

    A single column says how much a second label leads a first: the sigmoid of x is the softmax of
    (0, x).
    """
    if scores.shape[1] > 1:
        return scores
    return torch.cat([torch.zeros_like(scores), scores], dim=1)


def head_of(score: Any) -> Head:
    """A classifier's score layer, however it is stored, as a head with a row for each label."""
    weight = score.weight
    states = torch.eye(score.input_size, dtype=score.params_dtype, device=weight.device)
    bias = score(states.new_zeros(1, score.input_size))
    rows = score(states) - bias
    return Head(as_labels(rows).T.float().contiguous(), as_labels(bias)[0].float())


def use_early_scores(
    model: Any,
    take_output: Callable[[], StepOutput | None],
    judge_later: Callable[[Judgement], None],
) -> None:
    """Let the pooler of a classifier return early scores, and only the classes of prompts."""
    score_head_of(model)
    classify_with(model, EarlyScoreHead(model.score, take_output, judge_later))


def score_head_of(model: Any) -> ScoreHead | None:
    """The function that turns a classifier's scores into probabilities; None if a model generates.

    An AdaInferError if it is a function that no policy promises anything about.
    """
    if not is_classifier(model):
        return None
    made_into = activation_of(model)
    if made_into is None:
        raise AdaInferError(
            "vllm-adainfer: policies promise probabilities, of one class among several or of each "
            "label, and the scores of this classifier are made into something else (see "
            'problem_type in its config.json): drop "adainfer" from additional_config'
        )
    if model.score.output_size == 1:
        return "sigmoid"
    return "softmax" if made_into == "classes" else "sigmoids"


def check_scores(model: Any, name: str, config: ArtifactConfig) -> None:
    """Check that a policy for scores has a label for each column of this model."""
    labels, columns = len(config.labels), model.score.output_size
    if (labels, config.score_head) != (max(2, columns), score_head_of(model)):
        raise AdaInferError(
            f"policy {name} was calibrated for {labels} labels ({config.score_head}), and the "
            f"score head of this model has {columns} columns: calibrate for this model"
        )
