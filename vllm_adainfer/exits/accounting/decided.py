"""How tokens were decided, one by one, for those who audit answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_adainfer.artifact.kinds import NotCovered

Outcome = Literal["early", "full_depth", "shadow"]
# Why a request that its policy serves ran to full depth in a step: its bound covers fewer tokens;
# others, or its own later tokens, need its keys and values; the weights are not those of the
# calibration; too many rows wait for layers; or too many of the policy's answers differ.
WhyFullDepth = Literal[
    "beyond_bound", "keys_needed", "other_weights", "deferred_rows", "too_many_differ"
]


@dataclass(frozen=True)
class DecidedToken:
    """How one token was decided.

    Attributes:
        place: the place of its request in the step's batch.
        policy: the policy that its request came under, or `NO_POLICY`.
        layers: how many layers its last row ran.
        outcome: whether a probe gave the answer, the full model, or the full model for a shadow
            request, whose early answer was only compared.

    """

    place: int
    policy: str
    layers: int
    outcome: Outcome


@dataclass(frozen=True)
class Provenance:
    """Where one token of a request came from.

    Attributes:
        request_id: vLLM's id.
        policy: see `DecidedToken`.
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
