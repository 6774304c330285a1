"""How tokens were decided, one by one, for those who audit answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vllm_adainfer.artifact.kinds import NotCovered

Outcome = Literal["early", "full_depth", "shadow"]
# Why a request that its policy serves ran to full depth in a step: its bound covers fewer tokens;
# others, or its own later tokens, need its keys and values; the weights are not those of the
# calibration; too many rows wait for layers; or too many of the policy's answers differ.
WhyFullDepth = Literal[
    "beyond_bound", "keys_needed", "other_weights", "deferred_rows", "too_many_differ"
]


# How one token was decided: the place of its request in the step's batch, the policy that this came
# under (or `NO_POLICY`), how many layers its last row ran, and what gave the answer: a probe, the
# full model, or the full model for a shadow request, whose early answer was only compared.
DecidedToken: TypeAlias = tuple[int, str, int, Outcome]


@dataclass(frozen=True)
class Provenance:
    """Where one token of a request came from.

    Attributes:
        request_id: vLLM's id.
        policy: the policy that the request came under, or `NO_POLICY`.
        artifact: the digest of the policy's files; empty without a policy.
        epsilon: the bound that the policy kept; None without a policy.
        layers: see `DecidedToken`.
        outcome: see `DecidedToken`.
        not_covered: why the policy for the request's output did not serve its prompt.
        why_full_depth: why the step ran it to full depth all the same, if it did.

    """

    request_id: str
    policy: str
    artifact: str
    epsilon: float | None
    layers: int
    outcome: Outcome
    not_covered: NotCovered | None = None
    why_full_depth: WhyFullDepth | None = None
