"""Reports: a worker's counters, sent through the scheduler to the frontends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.accounting.decided import Provenance

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
        "weights_differ": stats.weights_differ,
        "failed_parts": list(stats.failed_parts),
    }


@dataclass(frozen=True)
class StepNote:
    """The worker's message to the scheduler after a step.

    Attributes:
        complete: for each request that may exit, how many of its first tokens are cached as at
            full depth; None where no scheduler needs it.
        counted: the worker's counters; None in most steps.
        decided: where the tokens of the step came from; empty unless answers are audited.

    """

    complete: dict[str, int] | None
    counted: Snapshot | None
    decided: tuple[Provenance, ...] = ()
