"""Prometheus series ``adainfer:``, on the same ``/metrics`` as vLLM's own.

Not ``vllm:``: vLLM unregisters all series with that prefix when an engine starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from vllm_adainfer.auto.kind_reports import NO_KIND, OTHERS
from vllm_adainfer.promise.probabilities import MOVES

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
EXIT_COUNTERS = {
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
CHOICE_COUNTERS = {
    "choices_finished": (
        "choices_finished",
        "Requests with a choice that ended as soon as one choice was left.",
        ENGINE,
    ),
    "choice_tokens_appended": (
        "choice_tokens_appended",
        "Tokens of those requests that were appended instead of sampled, the end included.",
        ENGINE,
    ),
}
KIND_COUNTERS = {
    "kind_requests": (
        "kind_requests",
        f"Requests by kind, under names that DIR/kinds.json explains; {OTHERS}: one-answer "
        f"requests without a name; {NO_KIND}: requests without a fixed set of answers.",
        KIND,
    ),
    "kind_tokens": ("kind_tokens", "Token rows that ran for them.", KIND),
}
# Name and help of each histogram, by its kind in reports; all are by policy.
HISTOGRAMS = {
    "tokens": ("exit_layer", "Number of layers run, by decided token."),
    "shadow_moves": (
        "shadow_largest_move",
        "Largest difference between a label's early probability and that of full depth, rounded up "
        "to a bucket.",
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
        histograms: the histograms, by their kind in reports; each is by policy.
        gauges: the gauges, by name.

    """

    def __init__(
        self, layers: tuple[int, ...] | None, choices: bool = False, kinds: bool = False
    ) -> None:
        """Register what a server can report: of `choices` that end early, and of `kinds`.

        `layers` are the buckets of ``adainfer:exit_layer``: exit points and full depth; None for a
        server that runs stock vLLM.
        """
        counted = {
            **(EXIT_COUNTERS if layers else {}),
            **(CHOICE_COUNTERS if choices else {}),
            **(KIND_COUNTERS if kinds else {}),
        }
        self._labels = {kind: labels for kind, (*_, labels) in counted.items()}
        self.counters = {kind: _register(Counter, *spec) for kind, spec in counted.items()}
        self.histograms: dict[str, Histogram] = {}
        self.gauges: dict[str, Gauge] = {}
        if layers:
            buckets = {"tokens": layers, "shadow_moves": MOVES}
            self.histograms = {
                kind: _register(Histogram, *spec, POLICY, buckets=buckets[kind])
                for kind, spec in HISTOGRAMS.items()
            }
            # Of several frontends, the one that was updated last has the current value.
            self.gauges = {
                name: _register(Gauge, name, text, labels, multiprocess_mode="mostrecent")
                for name, (text, labels) in GAUGES.items()
            }

    @property
    def all(self) -> list[MetricWrapperBase]:
        """Every series."""
        return [*self.counters.values(), *self.histograms.values(), *self.gauges.values()]

    def is_by_policy(self, kind: str) -> bool:
        """Whether counts of a kind in reports are those of a policy."""
        return "policy" in self._labels.get(kind, POLICY)

    def counters_of(self, labels: Sequence[str]) -> Iterator[Counter]:
        """The counters with these labels."""
        return (self.counters[kind] for kind, its in self._labels.items() if its == labels)

    def remove(self, *labels: str) -> None:
        """Remove all series with these values of `POLICY`.

        Several frontends keep theirs in files, from which prometheus_client cannot remove any.
        """
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            return
        found: list[MetricWrapperBase] = [*self.histograms.values()]
        found += [self.counters[kind] for kind in self.counters if self.is_by_policy(kind)]
        found += [self.gauges[name] for name, (_, its) in GAUGES.items() if "policy" in its]
        for metric in found:
            metric.remove_by_labels(dict(zip(POLICY, labels, strict=True)))
