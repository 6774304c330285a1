"""The log lines about exits, drafts and kinds of requests, one of each per stats interval."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from vllm_adainfer.auto.table import NO_KIND, OTHERS
from vllm_adainfer.frontend.series import KIND_COUNTERS

KINDS_TOLD = 3  # in a line


class LogLines:
    """Sums up one engine's reports between two log lines."""

    def __init__(self, depth: int) -> None:
        """`depth` is the model's number of layers; only lines about exits need it."""
        self._depth = depth
        self._sums: Counter[str] = Counter()
        self._kinds: dict[str, Counter[str]] = defaultdict(Counter)
        self._reads: dict[str, str] = {}
        self._state: Mapping[str, Any] = {}

    def add(self, report: Mapping[str, Any]) -> None:
        """Add the reports of an engine's observers."""
        for kind, *labels, added in report["added"]:
            self._sums[kind] += added
            if kind == "tokens":
                self._sums["layers of tokens"] += int(labels[-1]) * added
            elif kind in KIND_COUNTERS:
                self._kinds[kind][labels[0]] += added
        self._reads.update(report.get("reads", {}))
        if "shadow" in report:
            self._state = report

    def take(self) -> list[str]:
        """The lines: about exits if a token was decided since the last ones, about drafts if some
        were verified, about kinds if some request with a fixed set of answers ran.
        """
        lines = self._exits(), self._drafts(), self._told_kinds()
        self._sums.clear()
        self._kinds.clear()
        return [line for line in lines if line]

    def _exits(self) -> str:
        sums, state = self._sums, self._state
        if not sums["tokens"]:
            return ""
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
        if state["weights_differ"]:
            parts.append("no exits, because the policies are not for these weights")
        if state["failed_parts"]:
            parts.append(f"switched off by the self-test: {', '.join(state['failed_parts'])}")
        if state["not_tested"]:
            parts.append(f"not tested on this device: {state['not_tested']}")
        for policy, readings in state["shadow"].items():
            parts += [_disagreement(policy, reading) for reading in readings if reading["checked"]]
        return ", ".join(parts)

    def _drafts(self) -> str:
        drafted, kept = self._sums["structure_drafted"], self._sums["structure_kept"]
        if not drafted:
            return ""
        return f"structured answers: {drafted} tokens drafted, {kept} kept ({kept / drafted:.0%})"

    def _told_kinds(self) -> str:
        requests, tokens = self._kinds["kind_requests"], self._kinds["kind_tokens"]
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
        return f"of the token rows, one-answer requests are: {'; '.join(told)}" if told else ""


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
