"""Prometheus series ``adainfer:``, on the same ``/metrics`` as vLLM's own.

Not ``vllm:``: vLLM unregisters what begins with that when an engine starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from vllm_adainfer.config import NO_POLICY
from vllm_adainfer.exits.report import WORK
from vllm_adainfer.policy.artifact import ArtifactConfig

ENGINE = ["model_name", "engine"]
POLICY = [*ENGINE, "policy"]
LEVEL = [*POLICY, "epsilon"]
# What one frontend last heard is what is true, whichever of them heard it.
LATEST: Literal["mostrecent"] = "mostrecent"


_registered: list[MetricWrapperBase] = []  # those of the last server in this process


class Series:
    """All series of a server; its engines share them, by their labels."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        """`layers` are the buckets of the histogram: exit points and full depth.

        Those of an engine that was here before go, as vLLM does it with its own.
        """
        while _registered:
            REGISTRY.unregister(_registered.pop())
        self.layers_run = Counter(
            "adainfer:layer_rows_executed",
            "Rows x layers executed, counted where layers execute.",
            POLICY,
        )
        self.layers_skipped = Counter(
            "adainfer:layer_rows_skipped",
            "Rows x layers that will never be executed.",
            POLICY,
        )
        self.layers_deferred = Counter(
            "adainfer:layer_rows_deferred",
            "Rows x layers that wait until their request needs them; later executed or skipped.",
            POLICY,
        )
        self.exit_layer = Histogram(
            "adainfer:exit_layer",
            "Layers that decided tokens have run.",
            POLICY,
            buckets=layers,
        )
        self.seconds = Counter(
            "adainfer:forward_seconds", "Time in the stack of layers (on CPUs).", ENGINE
        )
        self.probe_seconds = Counter(
            "adainfer:probe_seconds", "Of these, time in which policies decided.", ENGINE
        )
        self.shadow_checked = Counter(
            "adainfer:shadow_checked", "Early answers compared with full depth.", LEVEL
        )
        self.shadow_disagreed = Counter(
            "adainfer:shadow_disagreed", "Early answers that differ from full depth.", LEVEL
        )
        self.disagreement = {
            end: Gauge(
                f"adainfer:shadow_disagreement{suffix}",
                f"Share of early answers that differ from full depth{what}.",
                LEVEL,
                multiprocess_mode=LATEST,
            )
            for end, suffix, what in (
                ("rate", "", ""),
                ("low", "_low", ", lower confidence bound"),
                ("high", "_high", ", upper confidence bound"),
            )
        }
        self.exits_allowed = Gauge(
            "adainfer:policy_exits_allowed",
            "1 where requests may exit, 0 where shadow requests have shown the bound to be broken.",
            LEVEL,
            multiprocess_mode=LATEST,
        )
        own = (one for one in vars(self).values() if isinstance(one, MetricWrapperBase))
        _registered.extend([*own, *self.disagreement.values()])


class EngineMetrics:
    """Adds one engine's reports to the series."""

    def __init__(
        self,
        shared: Series,
        model_name: str,
        engine: int,
        configs: Mapping[str, ArtifactConfig],
    ) -> None:
        """`configs` are those of the policies, by name."""
        self._series = shared
        self._labels = model_name, str(engine)
        shown = self._series
        for name in (*configs, NO_POLICY):  # so that rates begin at 0
            for kind in (*WORK, "exit_layer"):
                getattr(shown, kind).labels(*self._labels, name)
        for name, config in configs.items():
            for level in config.levels:
                labels = *self._labels, name, f"{level.epsilon:g}"
                shown.exits_allowed.labels(*labels).set(1)
        shown.seconds.labels(*self._labels)
        shown.probe_seconds.labels(*self._labels)

    def add(self, report: Mapping[str, Any]) -> None:
        """Add what a `vllm_adainfer.exits.report.Reporter` has sent."""
        for kind, policy, detail, added in report["added"]:
            self._add(kind, policy, detail, added)
        for policy, readings in report["shadow"].items():
            for reading in readings:
                labels = *self._labels, policy, f"{reading['epsilon']:g}"
                self._series.exits_allowed.labels(*labels).set(not reading["tightened"])
                if not reading["checked"]:
                    continue
                for end, gauge in self._series.disagreement.items():
                    gauge.labels(*labels).set(reading[end])

    def _add(self, kind: str, policy: str, detail: str, added: float) -> None:
        if kind == "tokens":
            histogram = self._series.exit_layer.labels(*self._labels, policy)
            for _ in range(int(added)):
                histogram.observe(int(detail))
            return
        labels = [*self._labels, *([policy] if policy else []), *([detail] if detail else [])]
        getattr(self._series, kind).labels(*labels).inc(added)
