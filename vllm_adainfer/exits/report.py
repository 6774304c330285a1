"""Reports: what a worker has counted, on its way through the scheduler to the frontends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_adainfer.exits.counters import ExitStats
from vllm_adainfer.policy.monitor import Reading

Key = tuple[str, str, str]  # kind of counter, the policy it is of, and the layer or epsilon, if any
WORK = ("layers_run", "layers_skipped", "layers_deferred")
INTERVAL = 0.25  # seconds between reports, while there is work: to send counters takes its time


@dataclass(frozen=True)
class Snapshot:
    """A worker's counters at one moment; the worker goes on counting while this is sent.

    Attributes:
        counts: every counter; each only ever grows.
        shadow: by policy, what shadow requests have shown in all, by level.

    """

    counts: tuple[tuple[Key, float], ...]
    shadow: tuple[tuple[str, tuple[Reading, ...]], ...]


def snapshot_of(stats: ExitStats) -> Snapshot:
    """`stats` as they are now."""
    counts: list[tuple[Key, float]] = [
        (("seconds", "", ""), stats.seconds),
        (("probe_seconds", "", ""), stats.probe_seconds),
    ]
    for name, own in stats.by_policy.items():
        for kind in WORK:
            counts.append(((kind, name, ""), getattr(own, kind)))
        for layer, tokens in own.exit_histogram.items():
            counts.append((("tokens", name, str(layer)), tokens))
        for epsilon, checked in own.shadow_checked.items():
            level = f"{epsilon:g}"
            counts.append((("shadow_checked", name, level), checked))
            counts.append((("shadow_disagreed", name, level), own.shadow_disagreed[epsilon]))
    shadow = tuple((name, tuple(monitor.readings())) for name, monitor in stats.shadow.items())
    return Snapshot(tuple(counts), shadow)


@dataclass(frozen=True)
class StepNote:
    """What the worker tells the scheduler after a step.

    Attributes:
        complete: of each request that may exit, how many of its first tokens the cache has as at
            full depth; None where nobody asks.
        counted: the worker's counters, None in most steps.

    """

    complete: dict[str, int] | None
    counted: Snapshot | None


class Reporter:
    """Turns snapshots into reports of what was added since the last one.

    Reports are increments, because each goes to one of several frontends, which add them up.
    """

    def __init__(self) -> None:
        self._sent: dict[Key, float] = {}

    def report(self, counted: Snapshot) -> dict[str, Any]:
        """What `counted` has more than the last one, and what shadow requests show in all."""
        before, self._sent = self._sent, dict(counted.counts)
        added = [(*key, count - before.get(key, 0)) for key, count in counted.counts]
        return {
            "added": [entry for entry in added if entry[-1]],
            "shadow": {
                name: [{"epsilon": one.epsilon, **one.as_dict()} for one in readings]
                for name, readings in counted.shadow
            },
        }
