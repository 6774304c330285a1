"""One line about exits for each stats interval of the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm_adainfer.decision.monitor import confidence_interval


class LogLine:
    """Collects one engine's reports between two lines."""

    def __init__(self, depth: int) -> None:
        """`depth` is the model's."""
        self._depth = depth
        self._sums: Counter[str] = Counter()
        self._shadow: Mapping[str, Mapping[str, Any]] = {}

    def add(self, report: Mapping[str, Any]) -> None:
        """Add what a `vllm_adainfer.runtime.report.Reporter` has sent."""
        for kind, _, detail, added in report["added"]:
            self._sums[kind] += added
            if kind == "tokens":
                self._sums["layers of tokens"] += int(detail) * added
        self._shadow = report["shadow"]

    def take(self) -> str | None:
        """The line; None if nothing was decided since the last one."""
        sums, self._sums = self._sums, Counter()
        if not sums["tokens"]:
            return None
        possible = sums["layers_run"] + sums["layers_skipped"]
        parts = [
            f"mean exit layer {sums['layers of tokens'] / sums['tokens']:.1f}/{self._depth}",
            f"layers saved {sums['layers_skipped'] / max(possible, 1):.0%}",
        ]
        if sums["seconds"]:
            parts.append(f"probes {sums['probe_seconds'] / sums['seconds']:.1%} of the time")
        for policy, shadow in self._shadow.items():
            parts += [
                _disagreement(policy, shadow["alpha"], *level)
                for level in shadow["levels"]
                if level[1]
            ]
        return ", ".join(parts)


def _disagreement(
    policy: str, alpha: float, epsilon: float, checked: int, disagreed: int, tightened: bool
) -> str:
    low, high = confidence_interval(disagreed, checked, alpha)
    state = ": at full depth now" if tightened else ""
    return (
        f"shadow disagreement of {policy} at {epsilon:g} {disagreed / checked:.1%} "
        f"[{100 * low:.1f}, {100 * high:.1f}]{state}"
    )
