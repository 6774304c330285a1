"""Artifacts whose parts do not go together are refused, with what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import student
from tests.tiny import EXIT_POINTS, tiny_config, tiny_tensors
from tests.unit.test_choice_policy import YES_NO
from tests.unit.test_pooled_policy import POOLED, QUESTIONS, last_token, levels
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import (
    Label,
    LabelBound,
    LabelRisk,
    Level,
    SharedTokens,
)
from vllm_adainfer.artifact.files import load_artifact_config, save_artifact
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.promise.gates import Gate

BRANCHED: dict[str, Any] = {**POOLED, "branches": (2, 5)}
WITH_STUDENT: dict[str, Any] = {"exit_points": (0, 3), **student.asked_with()}
GATES: dict[str, Any] = {"risk": "probability", "gates": (Gate(label="bad", probability=0.8),)}
BY_QUESTION: dict[str, Any] = {"questions": QUESTIONS, "by_question": True}
TOKENS: dict[str, Any] = {"candidates": "full", "labels": ()}
FROM_ZERO = "exit point 0 needs a student or a pooled-label-head"
NO_GATES = "needs a tolerance, gates or top_k"
CHOICES = r"choices|decide|token id"


def recall(*labels: str) -> dict[str, Any]:
    """Promises about these labels, and levels that have a risk for each."""
    bounds = [LabelBound(kind="recall", label=label, epsilon=0.08) for label in labels]
    risks = [LabelRisk(rows=90, risk=0.01, bound=0.04)] * len(bounds)
    level = Level(
        epsilon=0.05, disagreement=0, risk=0, bound=0.01, layers_saved=0.1, label_risks=risks
    )
    return {"label_bounds": bounds, "levels": (level,)}


def asked(name: str, *ends: list[int], certified: tuple[float, ...] = ()) -> dict[str, Any]:
    return {"questions": [{"name": name, "ends": ends, "certified": certified}]}


CONFIGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (POOLED, {"pooled_from": None}, "pooled_from goes with a pooled-label-head, and that"),
    ({}, {"pooled_from": 4}, "pooled_from goes with a pooled-label-head, and that needs it"),
    (POOLED, {"pooled_from": 0}, "greater than or equal to 1"),
    ({}, {"last_token": last_token()}, "last_token goes with a pooled-label-head"),
    (POOLED, {"max_tokens": 2}, "a pooled-label-head needs max_tokens = 1"),
    (POOLED, TOKENS, "a label-head needs labels"),
    ({}, {"exit_points": (0, 2)}, FROM_ZERO),
    ({}, {"exit_points": (0, 3, 5), "max_tokens": 2}, FROM_ZERO),
    (TOKENS, {"exit_points": (0, 2), "probe": "logit-lens"}, FROM_ZERO),
    (TOKENS, {"exit_points": (0, 2), "probe": "lens"}, FROM_ZERO),
    (POOLED, {"last_token": last_token(exit_points=(0, 2))}, FROM_ZERO),
    (POOLED, {"last_token": last_token(exit_points=(3, 2))}, "exit_points must ascend"),
    (POOLED, {"last_token": last_token(exit_points=(2, 6))}, "exit_points must ascend"),
    (
        {**POOLED, **BY_QUESTION},
        {"last_token": last_token(certified={"mood": (0.01,)})},
        "epsilons of questions must be among those of the levels",
    ),
    (
        POOLED,
        {"last_token": last_token(one_bound=True, levels=levels(0.05))},
        "parts with one bound must have the same epsilons",
    ),
    (POOLED, {"branches": (5, 2)}, "branches must ascend and be among the exit points"),
    (POOLED, {"branches": (2, 2)}, "branches must ascend and be among the exit points"),
    (POOLED, {"branches": (3,)}, "branches must ascend and be among the exit points"),
    (POOLED, {"branches": (0,)}, "among the exit points after the first layer"),
    ({}, {"branches": (2,)}, "branches go with a pooled-label-head"),
    (WITH_STUDENT, {"exit_points": (2, 3)}, "a student decides at exit point 0, so there must be"),
    (WITH_STUDENT, {"probe": "lens"}, "a student needs the label-heads' scores and max_tokens = 1"),
    (WITH_STUDENT, {"max_tokens": 4}, "a student needs the label-heads' scores and max_tokens = 1"),
    (WITH_STUDENT, {"classifier": "crf"}, "a crf needs every exit point to be asked"),
    (WITH_STUDENT, {"shared": SharedTokens(start=(1,))}, "a student does not read the tokens that"),
    (WITH_STUDENT, {"shared": SharedTokens()}, "calibrate again"),
    (WITH_STUDENT, {"student": None}, FROM_ZERO),
    ({}, {"by_question": True}, "by_question needs questions"),
    ({}, {"questions": QUESTIONS}, "if and only if by_question"),
    (BY_QUESTION, asked("a", [1]), "if and only if by_question"),
    (BY_QUESTION, asked("a", [1], certified=(0.3,)), "epsilons of questions must be among those"),
    ({}, asked("a", []), r"questions\.0\.ends\.0\s.* at least 1"),
    (recall(), {"never_early": ("ugly",)}, "must name labels of the policy"),
    (recall("ugly"), {}, "must name labels of the policy"),
    (recall("bad", "bad"), {}, "must each be about another label"),
    ({}, {"never_early": ("bad", "good")}, "some label must be allowed to leave early"),
    (recall("bad"), {"levels": levels(0.05)}, "each level must have a risk for each of label_bo"),
    (GATES, {"gates": (Gate(label="ugly", probability=0.5),)}, "must name labels of the policy"),
    (GATES, {"gates": GATES["gates"] * 2}, "gates must be different"),
    (GATES, {"tolerance": 0.1}, f"{NO_GATES}, and one"),
    (GATES, {"gates": ()}, f"{NO_GATES}, and one"),
    (GATES, {"label_mass": True}, "label_mass needs a tolerance"),
    (GATES, {"risk": "disagreement"}, NO_GATES),
    ({"label_pool": True}, {"probe": "lens"}, "a label pool and choices need a label-head"),
    (
        {"label_pool": True},
        {"labels": tuple(Label(name=str(i), token_id=i) for i in range(63))},
        "at most 62 items",
    ),
    (YES_NO, {"choices": YES_NO["choices"][:1]}, CHOICES),
    (YES_NO, {"undecided": (12,)}, CHOICES),
    (YES_NO, {"choices": (), "undecided": (30,)}, CHOICES),
    (YES_NO, {"max_tokens": 4}, CHOICES),
    (YES_NO, {"label_pool": True}, CHOICES),
    (YES_NO, {"risk": "probability", "tolerance": 0.1}, CHOICES),
]


@pytest.mark.parametrize(
    "base", [POOLED, BRANCHED, WITH_STUDENT, GATES, BY_QUESTION, recall("bad")]
)
def test_the_configs_that_the_table_spoils_are_taken_and_say_what_was_asked(tiny_model, base):
    config = tiny_config(tiny_model, **base)
    assert config == ArtifactConfig.model_validate_json(config.model_dump_json())
    assert config != tiny_config(tiny_model)


@pytest.mark.parametrize(("base", "changes", "sentence"), CONFIGS)
def test_a_config_that_contradicts_itself_is_refused(tiny_model, base, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_config(tiny_model, **{**base, **changes})


F64, I8 = torch.float64, torch.int8
MLP = "branch.mlp_in.bias"
NOT_OURS = "does not belong to this policy"
TENSORS: list[tuple[dict[str, Any], str, Tensor | None, str]] = [
    ({}, "exit.3.head_weight", torch.zeros(2, 63), r"must have shape \[2, 64\] but has \[2, 63\]"),
    ({}, "exit.5.classifier", None, r"exit.5.classifier must have shape \[3\] but is missing"),
    ({}, "thresholds", torch.zeros(3, 3), r"thresholds must have shape \[2, 3\]"),
    ({}, "extra", torch.zeros(3), f"'extra' {NOT_OURS}"),
    ({}, "thresholds", torch.zeros(2, 3, dtype=torch.int64), "must be F32 or"),
    ({}, "thresholds", torch.zeros(2, 3, dtype=F64), "must be F32 or"),
    (BY_QUESTION, "thresholds", torch.zeros(2, len(EXIT_POINTS)), "thresholds must have shape"),
    (WITH_STUDENT, "exit.0.head_weight", torch.zeros(2, 64), r"must have shape \[2, 16\]"),
    (POOLED, "exit.0.head_weight", torch.zeros(2, 64), r"shape \[2, 128\] but has \[2, 64\]"),
    (POOLED, "last-token.exit.2.head_weight", torch.zeros(2, 128), r"shape \[2, 64\] but has"),
    (POOLED, "last-token.thresholds", torch.zeros(3, 2), r"must have shape \[2, 2\] but has"),
    (POOLED, "last-token.exit.5.head_bias", torch.zeros(2), NOT_OURS),
    (POOLED, "last-token.last-token.thresholds", torch.zeros(2, 2), NOT_OURS),
    (POOLED, "exit.2.classifier", None, "exit.2.classifier must have shape .* but is missing"),
    (POOLED, "last-token.exit.3.classifier", None, "must have shape .* but is missing"),
    (BRANCHED, "exit.2.branch.project.weight", torch.zeros(192, 63), r"64\] but has \[192, 63\]"),
    (BRANCHED, f"exit.2.{MLP}", None, r"exit.2.branch.mlp_in.bias must have shape \[384\]"),
    (BRANCHED, f"exit.2.{MLP}", torch.zeros(384, dtype=I8), "must be F32 or F16 or"),
    (BRANCHED, "exit.2.head_weight", torch.zeros(2, 128), r"\[2, 384\] but has \[2, 128\]"),
    (BRANCHED, f"exit.0.{MLP}", torch.zeros(384), NOT_OURS),
    (BRANCHED, f"last-token.exit.2.{MLP}", torch.zeros(384), NOT_OURS),
]


@pytest.mark.parametrize(("base", "name", "tensor", "sentence"), TENSORS)
def test_tensors_that_do_not_belong_there_are_refused_before_one_is_read(
    tiny_model, tmp_path, monkeypatch, base, name, tensor, sentence
):
    config = tiny_config(tiny_model, **base)
    tensors = tiny_tensors(config)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    encoder = (student.encoder(), student.tokenizer()) if config.student else ()
    save_artifact(tmp_path / "policy", config, tensors, {}, "card\n", *encoder)
    monkeypatch.setattr("vllm_adainfer.artifact.files.load_file", None)
    with pytest.raises(AdaInferError, match=f"policy.safetensors.*{sentence}"):
        load_artifact_config(str(tmp_path / "policy"))
