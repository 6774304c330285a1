"""Adds the reports of an engine to the server's series."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from prometheus_client import Histogram

from vllm_adainfer.artifact.artifact import all_parts
from vllm_adainfer.artifact.config import ArtifactConfig, policy_of
from vllm_adainfer.artifact.kinds import NotCovered
from vllm_adainfer.auto.table import NO_KIND, OTHERS
from vllm_adainfer.engine.compat.prometheus import observe_many
from vllm_adainfer.engine.self_test.parts import PARTS
from vllm_adainfer.frontend.series import (
    ENGINE,
    KIND,
    LABELS,
    POLICY,
    Series,
    counters_of,
    remove_policy,
)
from vllm_adainfer.settings.engine import NO_POLICY


class EngineMetrics:
    """Adds one engine's reports to the series."""

    def __init__(
        self,
        series: Series,
        model_name: str,
        engine: int,
        configs: Mapping[str, ArtifactConfig],
        calibrates_itself: bool = False,
    ) -> None:
        """Create the engine's series, so that their rates begin at 0.

        `configs` are by policy name; where it `calibrates_itself`, policies that come later are its
        own, not those of adapters.
        """
        self._series = series
        self._calibrates_itself = calibrates_itself
        self._labels = model_name, str(engine)
        self._described = {NO_POLICY}
        for counter in counters_of(series, ENGINE):
            counter.labels(*self._labels)
        for counter in counters_of(series, KIND):
            for name in NO_KIND, OTHERS:
                counter.labels(*self._labels, name)
        if "weights_differ" in series:
            self._begin_exits(configs)

    def _begin_exits(self, configs: Mapping[str, ArtifactConfig]) -> None:
        for policy in configs:
            for reason in get_args(NotCovered):
                self._series["not_covered"].labels(*self._labels, policy, reason)
        configs = all_parts(configs)
        for name in (*configs, NO_POLICY):
            for counter in counters_of(self._series, POLICY):
                counter.labels(*self._labels, name)
            self._series["tokens"].labels(*self._labels, name)
        for name, config in configs.items():
            self._describe(name, "" if config.adapter is None else config.adapter.name)
            if config.promise.reads_probabilities:
                self._series["shadow_moves"].labels(*self._labels, name)
            for level in config.levels:
                self._set("policy_exits_allowed", 1, name, f"{level.epsilon:g}")
        self._set("weights_differ", 0)
        for part in PARTS:
            self._set("self_test_failed", 0, part)

    def add(self, report: Mapping[str, Any]) -> None:
        """Add the reports of an engine's observers.

        The series of policies that are no longer in service are removed, and their counts ignored.
        """
        if "serving" in report:
            self._show_policies(report["serving"])
        for kind, *labels, added in report["added"]:
            if "policy" not in LABELS[kind] or labels[0] in self._described:
                self._add(kind, labels, added)
        if "serving" in report:
            self._show_state(report)

    def _show_policies(self, serving: Sequence[str]) -> None:
        for policy in self._described.difference(serving):
            remove_policy(self._series, *self._labels, policy)
            self._described.remove(policy)
        for policy in set(serving) - self._described:
            # It came with the adapter of its name, or is for a kind of requests.
            adapter = "" if self._calibrates_itself else policy_of(policy)
            self._describe(policy, adapter)

    def _show_state(self, report: Mapping[str, Any]) -> None:
        self._set("weights_differ", report["weights_differ"])
        if report["not_tested"]:  # of the parts, kernels alone can be tested without requests
            for part in set(PARTS) - {"kernels"}:
                self._set("self_test_failed", math.nan, part)
        for part in report["failed_parts"]:
            self._set("self_test_failed", 1, part)
        for policy in self._described.intersection(report["changed_at_most"]):
            self._set("policy_changed_at_most", report["changed_at_most"][policy], policy)
        if (most := report["all_changed_at_most"]) is not None:
            self._set("changed_at_most", most)
        for policy, readings in report["shadow"].items():
            for reading in readings:
                labels = policy, f"{reading['epsilon']:g}"
                self._set("policy_exits_allowed", not reading["tightened"], *labels)
                if reading["checked"]:
                    self._set("shadow_disagreement", reading["rate"], *labels)
                    self._set("shadow_disagreement_low", reading["low"], *labels)
                    self._set("shadow_disagreement_high", reading["high"], *labels)

    def _describe(self, policy: str, adapter: str) -> None:
        self._described.add(policy)
        self._set("policy_info", 1, policy, adapter)

    def _set(self, gauge: str, value: float, *labels: str) -> None:
        self._of(gauge, labels).set(value)

    def _add(self, kind: str, labels: Sequence[str], added: float) -> None:
        """Add to a counter, or to a histogram, whose value comes after the policy in `labels`."""
        if isinstance(self._series[kind], Histogram):
            *labels, value = labels
            observe_many(self._of(kind, labels), float(value), int(added))
        else:
            self._of(kind, labels).inc(added)

    def _of(self, kind: str, labels: Sequence[str]) -> Any:
        return self._series[kind].labels(*self._labels, *labels)
