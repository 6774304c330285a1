"""Reports: a worker's counters, sent through the scheduler to the frontends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.accounting.decided import Provenance
from vllm_adainfer.watch.watch import Reading

Key = tuple[str, ...]  # kind of counter; policy, if any; layer, epsilon or the like, if any
INTERVAL = 0.25  # seconds between reports while there is work: sending them takes time


@dataclass(frozen=True)
class Snapshot:
    """A worker's counters at one moment; the worker keeps counting while this is sent.

    Attributes:
        counts: every counter by its key; none ever falls.
        serving: names of the policies that serve now, see `ExitStats`.
        shadow: the readings of each policy's levels, by policy.
        weights_differ: see `ExitStats`.
        failed_parts: see `ExitStats`.

    """

    counts: tuple[tuple[Key, float], ...]
    serving: tuple[str, ...]
    shadow: tuple[tuple[str, tuple[Reading, ...]], ...]
    weights_differ: bool
    failed_parts: tuple[str, ...]


def snapshot_of(stats: ExitStats) -> Snapshot:
    """A snapshot of `stats`."""
    counts: list[tuple[Key, float]] = [
        (("seconds",), stats.seconds),
        (("probe_seconds",), stats.probe_seconds),
    ]
    for name, policy in stats.by_policy.items():
        counts += [((kind, name), count) for kind, count in policy.work.items()]
        for layer, tokens in policy.exit_histogram.items():
            counts.append((("tokens", name, str(layer)), tokens))
        for epsilon, checked in policy.shadow_checked.items():
            level = f"{epsilon:g}"
            counts.append((("shadow_checked", name, level), checked))
            counts.append((("shadow_disagreed", name, level), policy.shadow_disagreed[epsilon]))
        for promise, checked in policy.labels_checked.items():
            epsilon, kind, label = promise
            labels = name, f"{epsilon:g}", kind, label
            counts.append((("labels_checked", *labels), checked))
            counts.append((("labels_changed", *labels), policy.labels_changed[promise]))
        for reason, requests in policy.not_covered.items():
            counts.append((("not_covered", name, reason), requests))
        for move, answers in policy.shadow_moves.items():
            counts.append((("shadow_moves", name, f"{move:g}"), answers))
    shadow = tuple((name, tuple(monitor.readings())) for name, monitor in stats.shadow.items())
    return Snapshot(
        tuple(counts), tuple(stats.serving), shadow, stats.weights_differ, stats.failed_parts
    )


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


class Reporter:
    """Turns snapshots into reports of what each adds to the one before.

    A report is an increment because it goes to one of several frontends, which add them up.
    """

    def __init__(self) -> None:
        self._sent: dict[Key, float] = {}

    def report(self, counted: Snapshot) -> dict[str, Any]:
        """What `counted` adds to the last snapshot, and its state of the policies."""
        before, self._sent = self._sent, dict(counted.counts)
        added = [(*key, count - before.get(key, 0)) for key, count in counted.counts]
        return {
            "added": [entry for entry in added if entry[-1]],
            "serving": list(counted.serving),
            "shadow": {
                name: [{"epsilon": one.epsilon, **one.as_dict()} for one in readings]
                for name, readings in counted.shadow
            },
            "weights_differ": counted.weights_differ,
            "failed_parts": list(counted.failed_parts),
        }
