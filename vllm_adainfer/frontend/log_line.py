"""The log lines about exits and about kinds of requests, one of each per stats interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.auto.kind_reports import NO_KIND, OTHERS

KINDS_TOLD = 3  # in a line


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
        if sums["not_covered"]:
            parts.append(
                f"requests that no policy covers because of their prompt: {sums['not_covered']}"
            )
        if self._weights_differ:
            parts.append("no exits, because the policies are not for these weights")
        if self._failed_parts:
            parts.append(f"switched off by the self-test: {', '.join(self._failed_parts)}")
        for policy, readings in self._shadow.items():
            parts += [_disagreement(policy, reading) for reading in readings if reading["checked"]]
        return ", ".join(parts)


def _disagreement(policy: str, reading: Mapping[str, Any]) -> str:
    state = ""
    if reading["tightened"]:
        latest = f"{reading['latest_disagreed']} of the latest {reading['latest_checked']}"
        state = f", {latest}: now at full depth"
    return (
        f"shadow disagreement of {policy} at {reading['epsilon']:g} "
        f"{reading['rate']:.1%} "
        f"[{100 * reading['low']:.1f}, {100 * reading['high']:.1f}]{state}"
    )


class KindLine:
    """Sums up which kinds of requests came to one engine between two log lines."""

    def __init__(self) -> None:
        self._reads: dict[str, str] = {}
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def add(self, report: Sequence[tuple[str, str, int, int]]) -> None:
        """Add a report of `vllm_adainfer.auto.kind_reports.KindReporter`."""
        for name, reads, requests, tokens in report:
            self._reads[name] = reads
            self._requests[name] += requests
            self._tokens[name] += tokens

    def take(self) -> str | None:
        """The line; None if no request with a fixed set of answers ran since the last one."""
        requests, self._requests = self._requests, Counter()
        tokens, self._tokens = self._tokens, Counter()
        total = tokens.total()
        ran = [(name, count) for name, count in tokens.most_common() if count]
        kinds = [(name, count) for name, count in ran if name not in (NO_KIND, OTHERS)]
        told = [
            f"{name} ({self._reads[name]}): {requests[name]} requests, {count / total:.0%}"
            for name, count in kinds[:KINDS_TOLD]
        ]
        rest = tokens[OTHERS] + sum(count for _, count in kinds[KINDS_TOLD:])
        if rest:
            told.append(f"other kinds: {rest / total:.0%}")
        return f"of the token rows, one-answer requests are: {'; '.join(told)}" if told else None
