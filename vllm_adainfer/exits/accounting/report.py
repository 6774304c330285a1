"""What a worker tells the scheduler of a step: its counters, and how tokens were decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from vllm_adainfer.artifact.kinds import NotCovered
from vllm_adainfer.exits.accounting.counters import ExitStats

Outcome = Literal["early", "full_depth", "shadow"]
# Why a request that its policy serves ran to full depth in a step: its bound covers fewer tokens;
# others, or its own later tokens, need its keys and values; the weights are not those of the
# calibration; too many rows wait for layers; too many of the policy's answers differ; or the step
# had no room for the guess behind the prompt.
WhyFullDepth = Literal[
    "beyond_bound",
    "keys_needed",
    "other_weights",
    "deferred_rows",
    "too_many_differ",
    "not_guessed",
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


class DecidedObject(NamedTuple):
    """An object by the heads of a policy, as a number, and whether it is the early answer.

    Otherwise the request has run to full depth, and the object is what it probably says. With the
    log-probabilities of all values among those of their fields, if the request reads them.
    """

    policy: str
    code: int
    is_early: bool
    value_logprobs: Sequence[float] | None = None


Key = tuple[str, ...]  # kind of counter; policy, if any; layer, epsilon or the like, if any
Snapshot: TypeAlias = dict[str, Any]
INTERVAL = 0.25  # seconds between reports while there is work: sending them takes time


def snapshot_of(stats: ExitStats) -> Snapshot:
    """The counters of `stats` at one moment; the worker keeps counting while this is sent.

    ``counts`` has every counter by its key, and none ever falls. Everything else is the state of
    something: the policies that serve, the readings of their levels, and as in `ExitStats`.
    """
    counts: dict[Key, float] = {
        ("seconds",): stats.seconds,
        ("probe_seconds",): stats.probe_seconds,
    }
    for name, policy in stats.by_policy.items():
        counts |= {(kind, name): count for kind, count in policy.work.items()}
        for layer, tokens in policy.exit_histogram.items():
            counts["tokens", name, str(layer)] = tokens
        for epsilon, checked in policy.shadow_checked.items():
            level = f"{epsilon:g}"
            counts["shadow_checked", name, level] = checked
            counts["shadow_disagreed", name, level] = policy.shadow_disagreed[epsilon]
        for promise, checked in policy.labels_checked.items():
            epsilon, kind, label = promise
            labels = name, f"{epsilon:g}", kind, label
            counts["labels_checked", *labels] = checked
            counts["labels_changed", *labels] = policy.labels_changed[promise]
        for reason, requests in policy.not_covered.items():
            counts["not_covered", name, reason] = requests
        for move, answers in policy.shadow_moves.items():
            counts["shadow_moves", name, f"{move:g}"] = answers
    return {
        "counts": counts,
        "serving": list(stats.serving),
        "shadow": {
            name: [{"epsilon": one.epsilon, **one.as_dict()} for one in monitor.readings()]
            for name, monitor in stats.shadow.items()
        },
        "changed_at_most": dict(stats.changed_at_most),
        "all_changed_at_most": stats.all_changed_at_most,
        "weights_differ": stats.weights_differ,
        "failed_parts": list(stats.failed_parts),
        "not_tested": stats.not_tested,
    }


@dataclass(frozen=True)
class StepNote:
    """The worker's message to the scheduler after a step.

    Attributes:
        complete: for each request that may exit, how many of its first tokens are cached as at
            full depth; None where no scheduler needs it.
        counted: the worker's counters; None in most steps.
        decided: where the tokens of the step came from; empty unless answers are audited.
        objects: the objects that were decided, by request.

    """

    complete: dict[str, int] | None
    counted: Snapshot | None
    decided: tuple[Provenance, ...] = ()
    objects: Mapping[str, DecidedObject] = field(default_factory=dict)
