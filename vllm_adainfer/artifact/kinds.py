"""The kinds of probes, risks, bounds and the like that ``config.json`` and metrics name.

Importable without torch.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

ProbeKind = Literal["lens", "label-head", "pooled-label-head", "logit-lens"]
LABEL_HEADS: tuple[ProbeKind, ...] = ("label-head", "pooled-label-head")
ClassifierKind = Literal["svm", "logreg", "threshold", "crf"]
Risk = Literal["disagreement", "accuracy", "probability"]
BoundKind = Literal["exact", "wsr"]
LabelBoundKind = Literal["recall", "precision"]
# What turns a classifier's scores into probabilities: a softmax of one column per label, or the
# sigmoid of a single column, which is a softmax of two labels, the first of which scores 0, or a
# sigmoid of each column, where any number of labels may hold.
ScoreHead = Literal["softmax", "sigmoid", "sigmoids"]
Candidates = Literal["labels", "shortlist", "full"]
# Why a policy does not serve a prompt: it lacks the tokens that all prompts of the calibration
# share, or asks a question that is not among the known ones.
NotCovered = Literal["other_prompt", "unknown_question"]

# A classifier's input: the columns of `adainfer_kernels.ProbeResult.features`, and of
# `vllm_adainfer.promise.probabilities.features_of`.
FEATURES = ("top_prob", "gap")
PROBABILITY_FEATURES = ("top_logit", "gap", "mass_logit")
GATE_FEATURES = ("gate_distance", "gate_margin")  # of `vllm_adainfer.promise.gates.Gates.features`


def features_of_risk(risk: Risk, has_gates: bool) -> tuple[str, ...]:
    """The features that a policy's classifiers read, given the risk that the policy bounds."""
    if has_gates:
        return GATE_FEATURES
    return PROBABILITY_FEATURES if risk == "probability" else FEATURES


class ProbeInput(Enum):
    """The input of a probe."""

    TEXT = "the text of its prompt"
    PROMPT = "the mean of the states of its prompt"
    OWN_STATES = "the state of each token of its prompt"
    LAST_TOKEN = "the state of its last token"
