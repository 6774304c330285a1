"""Prometheus series about requests with a choice, which also an engine without a policy has."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import REGISTRY, Counter

LABELS = ["model_name", "engine"]

_registered: list[Counter] = []  # by the latest server in this process


class ChoiceMetrics:
    """Counters of one server, which its engines share and tell apart by labels.

    Attributes:
        finished: requests.
        appended: their tokens.

    """

    def __init__(self, model_name: str, engines: Sequence[int]) -> None:
        """Series of an earlier engine in this process are unregistered."""
        while _registered:
            REGISTRY.unregister(_registered.pop())
        self._model_name = model_name
        self.finished = Counter(
            "adainfer:choices_finished",
            "Requests with a choice that ended without a step for the rest of it.",
            LABELS,
        )
        self.appended = Counter(
            "adainfer:choice_tokens_appended",
            "Their tokens that no step has sampled, with the end.",
            LABELS,
        )
        _registered.extend([self.finished, self.appended])
        for engine in engines:  # so that rates begin at 0
            self.add(engine, 0, 0)

    def add(self, engine: int, choices: int, tokens: int) -> None:
        """Add what an engine's scheduler has finished, and the tokens it appended."""
        self.finished.labels(self._model_name, str(engine)).inc(choices)
        self.appended.labels(self._model_name, str(engine)).inc(tokens)
