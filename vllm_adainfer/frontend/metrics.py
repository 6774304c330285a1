"""Prometheus series ``adainfer:``, on the same ``/metrics`` as vLLM's own.

Not ``vllm:``: vLLM unregisters all series with that prefix when an engine starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from vllm_adainfer.artifact.artifact import all_parts
from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.kinds import NotCovered
from vllm_adainfer.auto.kind_reports import NO_KIND, OTHERS
from vllm_adainfer.engine.self_test.parts import PARTS
from vllm_adainfer.frontend.compat_metrics import observe_many
from vllm_adainfer.promise.probabilities import MOVES
from vllm_adainfer.settings.engine import NO_POLICY

_Metric = TypeVar("_Metric", bound=MetricWrapperBase)
ENGINE = ["model_name", "engine"]
POLICY = [*ENGINE, "policy"]
LEVEL = [*POLICY, "epsilon"]
LABEL = [*LEVEL, "promise", "label"]
ADAPTER = [*POLICY, "adapter"]
REASON = [*POLICY, "reason"]
PART = [*ENGINE, "part"]
KIND = [*ENGINE, "kind"]
# Name, help and labels of each counter, by its kind in reports. A token-layer is one token in one
# layer.
COUNTERS = {
    "layers_run": ("layer_rows_executed", "Token-layers executed.", POLICY),
    "layers_skipped": ("layer_rows_skipped", "Token-layers that will never be executed.", POLICY),
    "layers_deferred": (
        "layer_rows_deferred",
        "Token-layers that wait until their request needs them; later executed or skipped.",
        POLICY,
    ),
    "seconds": ("forward_seconds", "Time in the stack of layers (on CPUs).", ENGINE),
    "probe_seconds": ("probe_seconds", "Part of forward_seconds spent on exit decisions.", ENGINE),
    "shadow_checked": (
        "shadow_checked",
        "Early answers compared with full depth; queries where their first documents are promised.",
        LEVEL,
    ),
    "shadow_disagreed": (
        "shadow_disagreed",
        "Those that differ from full depth, move a probability too far, or lose a document.",
        LEVEL,
    ),
    "labels_checked": (
        "shadow_label_checked",
        "Answers compared with full depth that a promise about one label is about.",
        LABEL,
    ),
    "labels_changed": ("shadow_label_changed", "Those of them that differ.", LABEL),
    "not_covered": (
        "requests_not_covered",
        "Requests for a policy's output that run all layers because of their prompt: it lacks the "
        "tokens that all prompts of the calibration share (other_prompt), or asks a question that "
        "is not known (unknown_question).",
        REASON,
    ),
}
# Help and labels of each gauge, by its name.
GAUGES = {
    "shadow_disagreement": ("Fraction of early answers that differ from full depth.", LEVEL),
    "shadow_disagreement_low": ("Lower confidence bound of shadow_disagreement.", LEVEL),
    "shadow_disagreement_high": ("Upper confidence bound of shadow_disagreement.", LEVEL),
    "policy_exits_allowed": (
        "0 once shadow requests have shown that the bound does not hold, else 1.",
        LEVEL,
    ),
    "weights_differ": (
        "1 while no request may exit, because the weights were replaced after the start and the "
        "policies are not for the new ones, else 0.",
        ENGINE,
    ),
    "self_test_failed": (
        "1 for each part that the self-test on this device found wrong and switched off, else 0.",
        PART,
    ),
    "policy_info": (
        "Always 1; its label names the LoRA adapter of a policy, empty for the base model.",
        ADAPTER,
    ),
}

_registered: dict[str, MetricWrapperBase] = {}  # by the latest server in this process


def _register(kind: type[_Metric], name: str, text: str, labels: list[str], **how: Any) -> _Metric:
    """Register a series in place of that of an earlier engine in this process, as vLLM does."""
    if name in _registered:
        REGISTRY.unregister(_registered.pop(name))
    metric = kind(f"adainfer:{name}", text, labels, **how)
    _registered[name] = metric
    return metric


class Series:
    """All series of a server; its engines share them and differ in their labels.

    Attributes:
        counters: the counters, by their kind in reports.
        histograms: the histograms, by their kind in reports.
        gauges: the gauges, by name.
        all: every series.

    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        """`layers` are the buckets of ``adainfer:exit_layer``: exit points and full depth."""
        self.counters = {kind: _register(Counter, *spec) for kind, spec in COUNTERS.items()}
        self.histograms = {
            "tokens": _register(
                Histogram,
                "exit_layer",
                "Number of layers run, by decided token.",
                POLICY,
                buckets=layers,
            ),
            "shadow_moves": _register(
                Histogram,
                "shadow_largest_move",
                "Largest difference between a label's early probability and that of full depth, "
                "rounded up to a bucket.",
                POLICY,
                buckets=MOVES,
            ),
        }
        self.gauges = {  # of several frontends, the one that was updated last has the current value
            name: _register(Gauge, name, text, labels, multiprocess_mode="mostrecent")
            for name, (text, labels) in GAUGES.items()
        }
        self.all: list[MetricWrapperBase] = [
            *self.counters.values(),
            *self.histograms.values(),
            *self.gauges.values(),
        ]

    def remove(self, *labels: str) -> None:
        """Remove all series with these values of `POLICY`.

        Several frontends keep theirs in files, from which prometheus_client cannot remove any.
        """
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            return
        chosen = dict(zip(POLICY, labels, strict=True))
        for metric in self.all:
            if metric not in (*self.counters_of(ENGINE), *self.gauges_of(ENGINE, PART)):
                metric.remove_by_labels(chosen)

    def counters_of(self, labels: Sequence[str]) -> list[Counter]:
        """The counters with these labels."""
        return [self.counters[kind] for kind, (*_, its) in COUNTERS.items() if its == labels]

    def gauges_of(self, *labels: Sequence[str]) -> list[Gauge]:
        """The gauges with any of these labels."""
        return [self.gauges[name] for name, (_, its) in GAUGES.items() if its in labels]


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

        Args:
            series: those of the server.
            model_name: the served model's name.
            engine: number of the engine.
            configs: the artifacts' configs, by policy name.
            calibrates_itself: whether policies that come later are its own, not those of adapters.

        """
        self._series = series
        self._calibrates_itself = calibrates_itself
        self._labels = model_name, str(engine)
        for policy in configs:
            for reason in get_args(NotCovered):
                series.counters["not_covered"].labels(*self._labels, policy, reason)
        configs = all_parts(configs)
        for name in (*configs, NO_POLICY):
            for counter in series.counters_of(POLICY):
                counter.labels(*self._labels, name)
            series.histograms["tokens"].labels(*self._labels, name)
        self._described = {NO_POLICY}
        for name, config in configs.items():
            self._describe(name, "" if config.adapter is None else config.adapter.name)
            if config.risk == "probability":
                series.histograms["shadow_moves"].labels(*self._labels, name)
            for level in config.levels:
                self._set("policy_exits_allowed", 1, name, f"{level.epsilon:g}")
        for counter in series.counters_of(ENGINE):
            counter.labels(*self._labels)
        self._set("weights_differ", 0)
        for part in PARTS:
            self._set("self_test_failed", 0, part)

    def add(self, report: Mapping[str, Any]) -> None:
        """Add a report of `vllm_adainfer.exits.accounting.report.Reporter`.

        The series of policies that are no longer in service are removed, and their counts ignored.
        """
        for policy in self._described.difference(report["serving"]):
            self._series.remove(*self._labels, policy)
            self._described.remove(policy)
        for policy in set(report["serving"]) - self._described:
            # It came with the adapter of its name, or is for a kind of requests.
            adapter = "" if self._calibrates_itself else policy.removesuffix(f":{LAST_TOKEN}")
            self._describe(policy, adapter)
        for kind, *labels, added in report["added"]:
            if not labels or labels[0] in self._described:
                self._add(kind, labels, added)
        self._set("weights_differ", report["weights_differ"])
        for part in report["failed_parts"]:
            self._set("self_test_failed", 1, part)
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
        self._series.gauges[gauge].labels(*self._labels, *labels).set(value)

    def _add(self, kind: str, labels: Sequence[str], added: float) -> None:
        """Add to a counter, or to a histogram, whose value comes after the policy in `labels`."""
        histogram = self._series.histograms.get(kind)
        if histogram is None:
            self._series.counters[kind].labels(*self._labels, *labels).inc(added)
        else:
            policy, value = labels
            observe_many(histogram.labels(*self._labels, policy), float(value), int(added))


class ChoiceMetrics:
    """A server's counters of requests with a choice; engines without a policy have them, too.

    Attributes:
        finished: counts requests that ended once one choice was left.
        appended: counts the tokens that were appended to them instead of sampled.

    """

    def __init__(self, model_name: str, engines: Sequence[int]) -> None:
        """Create the series of `engines`, so that their rates begin at 0."""
        self._model_name = model_name
        self.finished = _register(
            Counter,
            "choices_finished",
            "Requests with a choice that ended as soon as one choice was left.",
            ENGINE,
        )
        self.appended = _register(
            Counter,
            "choice_tokens_appended",
            "Tokens of those requests that were appended instead of sampled, the end included.",
            ENGINE,
        )
        for engine in engines:
            self.add(engine, 0, 0)

    def add(self, engine: int, choices: int, tokens: int) -> None:
        """Add the choices that an engine's scheduler finished, and the tokens it appended."""
        self.finished.labels(self._model_name, str(engine)).inc(choices)
        self.appended.labels(self._model_name, str(engine)).inc(tokens)


class KindMetrics:
    """A server's counters of kinds of requests, `requests`, and of their token rows, `tokens`."""

    def __init__(self, model_name: str, engines: Sequence[int]) -> None:
        """Create the series of `engines`, so that their rates begin at 0."""
        self._model_name = model_name
        self.requests = _register(
            Counter,
            "kind_requests",
            f"Requests by kind, under names that DIR/kinds.json explains; {OTHERS}: one-answer "
            f"requests without a name; {NO_KIND}: requests without a fixed set of answers.",
            KIND,
        )
        self.tokens = _register(Counter, "kind_tokens", "Token rows that ran for them.", KIND)
        for engine in engines:
            self.add(engine, [(NO_KIND, "", 0, 0), (OTHERS, "", 0, 0)])

    def add(self, engine: int, report: Sequence[tuple[str, str, int, int]]) -> None:
        """Add a report of `vllm_adainfer.auto.kind_reports.KindReporter`."""
        for name, _, requests, tokens in report:
            labels = self._model_name, str(engine), name
            self.requests.labels(*labels).inc(requests)
            self.tokens.labels(*labels).inc(tokens)
