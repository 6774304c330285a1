"""Reports: what a worker has counted, on its way through the scheduler to the frontends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_adainfer.stats import ExitStats

Key = tuple[str, str, str]  # kind of counter, the policy it is of, and the layer or epsilon, if any
INTERVAL = 0.25  # seconds between reports, while there is work: to send counters takes its time


@dataclass(frozen=True)
class StepNote:
    """What the worker tells the scheduler after a step.

    Attributes:
        complete: of each request that may exit, how many of its first tokens the cache has as at
            full depth; None where nobody asks.
        stats: the worker's counters, None in most steps.

    """

    complete: dict[str, int] | None
    stats: ExitStats | None


class Reporter:
    """Turns counters into reports of what was added since the last one.

    Reports are increments, because each goes to one of several frontends, which add them up.
    """

    def __init__(self) -> None:
        self._sent: dict[Key, float] = {}

    def report(self, stats: ExitStats) -> dict[str, Any]:
        """What `stats` have more than at the last report, and what shadow requests show in all."""
        counts = counts_of(stats)
        added = [(*key, count - self._sent.get(key, 0)) for key, count in counts.items()]
        self._sent = counts
        return {
            "added": [entry for entry in added if entry[-1]],
            "shadow": {
                name: {"alpha": monitor.alpha, "levels": [list(one) for one in monitor.counts()]}
                for name, monitor in stats.shadow.items()
            },
        }


def counts_of(stats: ExitStats) -> dict[Key, float]:
    """Every counter."""
    counts: dict[Key, float] = {
        ("seconds", "", ""): stats.seconds,
        ("probe_seconds", "", ""): stats.probe_seconds,
    }
    for name, own in stats.by_policy.items():
        counts["layers_run", name, ""] = own.layers_run
        counts["layers_skipped", name, ""] = own.layers_possible - own.layers_run
        for layer, tokens in own.exit_histogram.items():
            counts["tokens", name, str(layer)] = tokens
        for epsilon, checked in own.shadow_checked.items():
            counts["shadow_checked", name, f"{epsilon:g}"] = checked
            counts["shadow_disagreed", name, f"{epsilon:g}"] = own.shadow_disagreed[epsilon]
    return counts
