"""Prometheus series ``adainfer:``, on the same ``/metrics`` as vLLM's own.

Not ``vllm:``: vLLM unregisters all series with that prefix when an engine starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.frontend.compat_metrics import observe_many
from vllm_adainfer.policy.probabilities import MOVES
from vllm_adainfer.settings.engine import NO_POLICY

ENGINE = ["model_name", "engine"]
POLICY = [*ENGINE, "policy"]
LEVEL = [*POLICY, "epsilon"]
ADAPTER = [*POLICY, "adapter"]
# Of several frontends, the one that heard last has the current value.
LATEST: Literal["mostrecent"] = "mostrecent"
# By the report's kind: name of the counter, its help, its labels.
COUNTERS = {
    "layers_run": (
        "layer_rows_executed",
        "Rows x layers executed, counted where layers execute.",
        POLICY,
    ),
    "layers_skipped": (
        "layer_rows_skipped",
        "Rows x layers that will never be executed.",
        POLICY,
    ),
    "layers_deferred": (
        "layer_rows_deferred",
        "Rows x layers that wait until their request needs them; later executed or skipped.",
        POLICY,
    ),
    "seconds": ("forward_seconds", "Time in the stack of layers (on CPUs).", ENGINE),
    "probe_seconds": (
        "probe_seconds",
        "Part of forward_seconds in which policies decided.",
        ENGINE,
    ),
    "shadow_checked": ("shadow_checked", "Early answers compared with full depth.", LEVEL),
    "shadow_disagreed": (
        "shadow_disagreed",
        "Early answers that differ from full depth, or whose probabilities move too far.",
        LEVEL,
    ),
}
# By the reading's key: name of the gauge, what its help adds.
DISAGREEMENT = {
    "rate": ("shadow_disagreement", ""),
    "low": ("shadow_disagreement_low", ", lower confidence bound"),
    "high": ("shadow_disagreement_high", ", upper confidence bound"),
}

_registered: list[MetricWrapperBase] = []  # by the latest server in this process


class Series:
    """All series of a server, which its engines share and tell apart by labels.

    Attributes:
        counters: by the report's kind.
        exit_layer: a histogram, of the report's kind ``tokens``.
        shadow_move: a histogram, of the report's kind ``shadow_moves``.
        disagreement: gauges, by the reading's key.
        exits_allowed: a gauge.
        weights_differ: a gauge.
        info: a gauge.
        labelled: all of these, each with the names of its labels.

    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        """`layers` are the buckets of the histogram: exit points and full depth.

        Series of an earlier engine in this process are unregistered, as vLLM does with its own.
        """
        while _registered:
            REGISTRY.unregister(_registered.pop())
        self.counters = {
            kind: Counter(f"adainfer:{name}", text, labels)
            for kind, (name, text, labels) in COUNTERS.items()
        }
        self.exit_layer = Histogram(
            "adainfer:exit_layer", "Layers that decided tokens have run.", POLICY, buckets=layers
        )
        self.shadow_move = Histogram(
            "adainfer:shadow_largest_move",
            "Largest move of a label's probability between early answers and full depth, rounded "
            "up to a bucket.",
            POLICY,
            buckets=MOVES,
        )
        self.disagreement = {
            key: Gauge(
                f"adainfer:{name}",
                f"Share of early answers that differ from full depth{text}.",
                LEVEL,
                multiprocess_mode=LATEST,
            )
            for key, (name, text) in DISAGREEMENT.items()
        }
        self.exits_allowed = Gauge(
            "adainfer:policy_exits_allowed",
            "0 where shadow requests have shown the bound to be broken, else 1.",
            LEVEL,
            multiprocess_mode=LATEST,
        )
        self.weights_differ = Gauge(
            "adainfer:weights_differ",
            "1 while no request may exit, because the weights were replaced after the start by "
            "others than the policies are for, else 0.",
            ENGINE,
            multiprocess_mode=LATEST,
        )
        self.info = Gauge(
            "adainfer:policy_info",
            "Always 1: the LoRA adapter that a policy is for, empty for the base model.",
            ADAPTER,
            multiprocess_mode=LATEST,
        )
        self.labelled: list[tuple[MetricWrapperBase, list[str]]] = [
            *((self.counters[kind], labels) for kind, (*_, labels) in COUNTERS.items()),
            (self.exit_layer, POLICY),
            (self.shadow_move, POLICY),
            *((gauge, LEVEL) for gauge in self.disagreement.values()),
            (self.exits_allowed, LEVEL),
            (self.weights_differ, ENGINE),
            (self.info, ADAPTER),
        ]
        _registered.extend(metric for metric, _ in self.labelled)

    def remove(self, policy: tuple[str, ...]) -> None:
        """Remove all series with these values of `POLICY`.

        Several frontends keep theirs in files, out of which prometheus_client can remove none.
        """
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            return
        for metric, labels in self.labelled:
            samples = [sample.labels for family in metric.collect() for sample in family.samples]
            for values in {tuple(map(found.__getitem__, labels)) for found in samples}:
                if values[: len(POLICY)] == policy:
                    metric.remove(*values)

    def counters_of(self, labels: Sequence[str]) -> list[Counter]:
        """The counters with these labels."""
        return [self.counters[kind] for kind, (*_, its) in COUNTERS.items() if its == labels]


class EngineMetrics:
    """Adds one engine's reports to the series."""

    def __init__(
        self,
        series: Series,
        model_name: str,
        engine: int,
        configs: Mapping[str, ArtifactConfig],
    ) -> None:
        """`configs` are those of the policies, by name."""
        self._series = series
        self._labels = model_name, str(engine)
        for name in (*configs, NO_POLICY):  # so that rates begin at 0
            for counter in series.counters_of(POLICY):
                counter.labels(*self._labels, name)
            series.exit_layer.labels(*self._labels, name)
        self._described = {NO_POLICY}  # and all that have series
        for name, config in configs.items():
            self._describe(name, "" if config.adapter is None else config.adapter.name)
            if config.risk == "probability":
                series.shadow_move.labels(*self._labels, name)
            for level in config.levels:
                labels = *self._labels, name, f"{level.epsilon:g}"
                series.exits_allowed.labels(*labels).set(1)
        for series_of_engine in (*series.counters_of(ENGINE), series.weights_differ):
            series_of_engine.labels(*self._labels)

    def add(self, report: Mapping[str, Any]) -> None:
        """Add a report of `vllm_adainfer.exits.report.Reporter`.

        The series of a policy that no longer serves are removed, and what is counted of it then.
        """
        for policy in self._described.difference(report["serving"]):
            self._series.remove((*self._labels, policy))
            self._described.remove(policy)
        for kind, policy, detail, added in report["added"]:
            if policy and policy not in report["serving"]:
                continue
            if policy and policy not in self._described:
                self._describe(policy, adapter=policy)  # the name of one that came with an adapter
            self._add(kind, policy, detail, added)
        self._series.weights_differ.labels(*self._labels).set(report["weights_differ"])
        for policy, readings in report["shadow"].items():
            if policy not in self._described:
                self._describe(policy, adapter=policy)
            for reading in readings:
                labels = *self._labels, policy, f"{reading['epsilon']:g}"
                self._series.exits_allowed.labels(*labels).set(not reading["tightened"])
                if not reading["checked"]:
                    continue
                for key, gauge in self._series.disagreement.items():
                    gauge.labels(*labels).set(reading[key])

    def _describe(self, policy: str, adapter: str) -> None:
        self._described.add(policy)
        self._series.info.labels(*self._labels, policy, adapter).set(1)

    def _add(self, kind: str, policy: str, detail: str, added: float) -> None:
        histograms = {"tokens": self._series.exit_layer, "shadow_moves": self._series.shadow_move}
        if kind in histograms:
            histogram = histograms[kind].labels(*self._labels, policy)
            observe_many(histogram, float(detail), int(added))
            return
        labels = [*self._labels, *([policy] if policy else []), *([detail] if detail else [])]
        self._series.counters[kind].labels(*labels).inc(added)
