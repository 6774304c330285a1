"""Names of probes, classifiers, risks, bounds and candidates; importable without torch.

The command line offers them, and an artifact's ``config.json`` holds them.
"""

from __future__ import annotations

from typing import Literal

ProbeKind = Literal["lens", "label-head", "logit-lens"]
ClassifierKind = Literal["svm", "logreg", "threshold", "rbf", "boosting", "crf"]
Risk = Literal["disagreement", "accuracy", "probability"]
BoundKind = Literal["exact", "wsr", "hoeffding-bentkus", "naive"]
Candidates = Literal["labels", "shortlist", "full"]

# On the command line; --tolerance asks for the third risk.
RiskChoice = Literal["disagreement", "accuracy"]
# Likewise; auto takes label-head with --labels and lens without.
ProbeChoice = Literal["auto", ProbeKind]
# Likewise; auto takes exact for one-token answers that are changed or not, and wsr otherwise.
BoundChoice = Literal["auto", BoundKind]
# Likewise; what is certified on its own. Without it, all prompts together are.
By = Literal["question"]

# What a classifier reads of a probe: columns of `adainfer_kernels.ProbeResult.features`, and of
# `vllm_adainfer.policy.probabilities.features_of`.
FEATURES = ("top_prob", "gap")
PROBABILITY_FEATURES = ("top_logit", "gap", "mass_logit")


def features_of_risk(risk: Risk) -> tuple[str, ...]:
    """What the classifiers of a policy read, by what the policy bounds."""
    return PROBABILITY_FEATURES if risk == "probability" else FEATURES
