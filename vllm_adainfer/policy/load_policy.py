"""From an artifact to the policy that it describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.policy.calibrated_policy import CalibratedPolicy
from vllm_adainfer.policy.choice_policy import ChoicePolicy
from vllm_adainfer.policy.gate_policy import GatePolicy
from vllm_adainfer.policy.label_heads import PoolPolicy
from vllm_adainfer.policy.probability_policy import ProbabilityPolicy
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.ranking_policy import RankingPolicy

Policy: TypeAlias = CalibratedPolicy | PoolPolicy | ProbabilityPolicy | GatePolicy | RankingPolicy


def policy_of(
    artifact: Artifact, device: torch.device, logit_lens: Callable[[Tensor | None], Probe]
) -> Policy:
    """The policy of an artifact.

    Args:
        artifact: the artifact, or one of its parts, with its tensors.
        device: the device of the rows it decides.
        logit_lens: that of the served model, with its LM head (None) or with the rows given,
            [n, head size].

    """
    if artifact.config.gates:
        return GatePolicy(artifact, device)
    if artifact.config.top_k is not None:
        return RankingPolicy(artifact, device)
    if artifact.config.risk == "probability":
        return ProbabilityPolicy(artifact, device)
    if artifact.config.label_pool:
        return PoolPolicy(artifact, device)
    if artifact.config.choices:
        return ChoicePolicy(artifact, device)
    lens = None
    if not artifact.config.has_label_heads:
        lens = logit_lens(artifact.tensors.get("head_rows"))
    return CalibratedPolicy(artifact, lens, device)
