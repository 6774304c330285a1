"""The log line about exits, one per stats interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


class LogLine:
    """Sums up one engine's reports between two log lines."""

    def __init__(self, depth: int) -> None:
        """`depth` is the model's number of layers."""
        self._depth = depth
        self._sums: Counter[str] = Counter()
        self._shadow: Mapping[str, Sequence[Mapping[str, Any]]] = {}
        self._weights_differ = False
        self._failed_parts: Sequence[str] = ()

    def add(self, report: Mapping[str, Any]) -> None:
        """Add a report of `vllm_adainfer.exits.accounting.report.Reporter`."""
        for kind, *labels, added in report["added"]:
            self._sums[kind] += added
            if kind == "tokens":
                self._sums["layers of tokens"] += int(labels[-1]) * added
        self._shadow = report["shadow"]
        self._weights_differ = report["weights_differ"]
        self._failed_parts = report["failed_parts"]

    def take(self) -> str | None:
        """The line; None if no token was decided since the last one."""
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
        if self._weights_differ:
            parts.append("no exits, because the policies are not for these weights")
        if self._failed_parts:
            parts.append(f"switched off by the self-test: {', '.join(self._failed_parts)}")
        for policy, readings in self._shadow.items():
            parts += [_disagreement(policy, reading) for reading in readings if reading["checked"]]
        return ", ".join(parts)


def _disagreement(policy: str, reading: Mapping[str, Any]) -> str:
    state = ": now at full depth" if reading["tightened"] else ""
    return (
        f"shadow disagreement of {policy} at {reading['epsilon']:g} "
        f"{reading['rate']:.1%} "
        f"[{100 * reading['low']:.1f}, {100 * reading['high']:.1f}]{state}"
    )
