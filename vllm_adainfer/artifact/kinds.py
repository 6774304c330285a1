"""The kinds of probes, bounds and the like that ``config.json`` and metrics name.

Importable without torch.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

ProbeKind = Literal["lens", "label-head", "pooled-label-head", "logit-lens"]
ProbeChoice = Literal["auto", "branch", ProbeKind]  # of `calibrate`
LABEL_HEADS: tuple[ProbeKind, ...] = ("label-head", "pooled-label-head")
ClassifierKind = Literal["svm", "logreg", "threshold", "crf"]
BoundKind = Literal["exact", "wsr"]
BoundChoice = Literal["auto", BoundKind]  # of `calibrate`
LabelBoundKind = Literal["recall", "precision"]
# What turns a classifier's scores into probabilities: a softmax of one column per label, or the
# sigmoid of a single column, which is a softmax of two labels, the first of which scores 0, or a
# sigmoid of each column, where any number of labels may hold.
ScoreHead = Literal["softmax", "sigmoid", "sigmoids"]
Candidates = Literal["labels", "shortlist", "full"]
# Why a policy does not serve a prompt: it lacks the tokens that all prompts of the calibration
# share, or asks a question that is not among the known ones.
NotCovered = Literal["other_prompt", "unknown_question"]


class ProbeInput(Enum):
    """The input of a probe."""

    TEXT = "the text of its prompt"
    PROMPT = "the mean of the states of its prompt"
    OWN_STATES = "the state of each token of its prompt"
    LAST_TOKEN = "the state of its last token"
