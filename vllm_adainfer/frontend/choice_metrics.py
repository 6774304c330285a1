"""Prometheus series about requests with a choice; engines without a policy have them, too."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import REGISTRY, Counter

LABELS = ["model_name", "engine"]

_registered: list[Counter] = []  # by the latest server in this process


class ChoiceMetrics:
    """Counters of one server; its engines share them and differ in their labels.

    Attributes:
        finished: counts requests that ended once one choice was left.
        appended: counts the tokens that were appended to them instead of sampled.

    """

    def __init__(self, model_name: str, engines: Sequence[int]) -> None:
        """Register the series, and unregister those of an earlier engine in this process."""
        while _registered:
            REGISTRY.unregister(_registered.pop())
        self._model_name = model_name
        self.finished = Counter(
            "adainfer:choices_finished",
            "Requests with a choice that ended as soon as one choice was left.",
            LABELS,
        )
        self.appended = Counter(
            "adainfer:choice_tokens_appended",
            "Tokens of those requests that were appended instead of sampled, the end included.",
            LABELS,
        )
        _registered.extend([self.finished, self.appended])
        for engine in engines:  # so that rates begin at 0
            self.add(engine, 0, 0)

    def add(self, engine: int, choices: int, tokens: int) -> None:
        """Add the choices that an engine's scheduler finished, and the tokens it appended."""
        self.finished.labels(self._model_name, str(engine)).inc(choices)
        self.appended.labels(self._model_name, str(engine)).inc(tokens)
