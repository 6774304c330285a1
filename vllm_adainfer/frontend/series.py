"""Prometheus series ``adainfer:``, on the same ``/metrics`` as vLLM's own.

Not ``vllm:``: vLLM unregisters all series with that prefix when an engine starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from vllm_adainfer.auto.table import NO_KIND, OTHERS
from vllm_adainfer.promise.probabilities import MOVES

Series = Mapping[str, MetricWrapperBase]  # by the kind of what they show in reports
ENGINE = ["model_name", "engine"]
POLICY = [*ENGINE, "policy"]
LEVEL = [*POLICY, "epsilon"]
LABEL = [*LEVEL, "promise", "label"]
ADAPTER = [*POLICY, "adapter"]
REASON = [*POLICY, "reason"]
PART = [*ENGINE, "part"]
KIND = [*ENGINE, "kind"]
GRAMMAR = [*ENGINE, "grammar"]
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
        "Requests with a grammar (a choice, say) that ended as soon as it left one answer.",
        ENGINE,
    ),
    "choice_tokens_appended": (
        "choice_tokens_appended",
        "Tokens of those requests that were appended instead of sampled, the end included.",
        ENGINE,
    ),
}
GRAMMAR_COUNTERS = {
    "structure_drafted": (
        "structure_tokens_drafted",
        "Tokens of structured answers that were drafted, by a digest of their grammar; others: "
        "grammars beyond the first 64 with drafts.",
        GRAMMAR,
    ),
    "structure_kept": (
        "structure_tokens_kept",
        "Those of them that the model wrote, too; each has spared its request a step.",
        GRAMMAR,
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
# The same of each histogram; they are by policy.
HISTOGRAMS = {
    "tokens": ("exit_layer", "Number of layers run, by decided token.", POLICY),
    "shadow_moves": (
        "shadow_largest_move",
        "Largest difference between a label's early probability and that of full depth, rounded up "
        "to a bucket.",
        POLICY,
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
    "policy_changed_at_most": (
        "Answers of a kind that a server which calibrates itself has changed, at most, with the "
        "confidence 1 - delta.",
        POLICY,
    ),
    "changed_at_most": ("The same of all kinds together, by one claim.", ENGINE),
    "weights_differ": (
        "1 while no request may exit, because the weights were replaced after the start and the "
        "policies are not for the new ones, else 0.",
        ENGINE,
    ),
    "self_test_failed": (
        "1 for each part that the self-test on this device found wrong and switched off, NaN for "
        "one that it could not test, else 0.",
        PART,
    ),
    "policy_info": (
        "Always 1; its label names the LoRA adapter of a policy, empty for the base model.",
        ADAPTER,
    ),
}
LABELS = {
    kind: labels
    for specs in (
        EXIT_COUNTERS,
        CHOICE_COUNTERS,
        GRAMMAR_COUNTERS,
        KIND_COUNTERS,
        HISTOGRAMS,
        GAUGES,
    )
    for kind, (*_, labels) in specs.items()
}
_registered: dict[str, MetricWrapperBase] = {}  # by the latest server in this process


def register_series(
    layers: tuple[int, ...] | None,
    choices: bool = False,
    kinds: bool = False,
    drafts: bool = False,
) -> Series:
    """The series of a server; its engines share them and differ in their labels.

    They replace those of an earlier engine in this process, as vLLM's do. `layers` are the buckets
    of ``adainfer:exit_layer``: exit points and full depth; None for a server that runs stock vLLM.
    """
    found: dict[str, MetricWrapperBase] = {}

    def register(metric: type[MetricWrapperBase], specs: Mapping[str, Any], **how: Any) -> None:
        for kind, (name, text, labels) in specs.items():
            if name in _registered:
                REGISTRY.unregister(_registered.pop(name))
            found[kind] = _registered[name] = metric(f"adainfer:{name}", text, labels, **how)

    if layers:
        register(Counter, EXIT_COUNTERS)
        for (kind, spec), buckets in zip(HISTOGRAMS.items(), (layers, MOVES), strict=True):
            register(Histogram, {kind: spec}, buckets=buckets)
        # Of several frontends, the one that was updated last has the current value.
        gauges = {name: (name, *spec) for name, spec in GAUGES.items()}
        register(Gauge, gauges, multiprocess_mode="mostrecent")
    if choices:
        register(Counter, CHOICE_COUNTERS)
    if drafts:
        register(Counter, GRAMMAR_COUNTERS)
    if kinds:
        register(Counter, KIND_COUNTERS)
    return found


def counters_of(series: Series, labels: Sequence[str]) -> Iterator[MetricWrapperBase]:
    """The counters with these labels."""
    for kind, metric in series.items():
        if isinstance(metric, Counter) and LABELS[kind] == labels:
            yield metric


def remove_policy(series: Series, *labels: str) -> None:
    """Remove all series with these values of `POLICY`.

    Several frontends keep theirs in files, from which prometheus_client cannot remove any.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        for kind, metric in series.items():
            if "policy" in LABELS[kind]:
                metric.remove_by_labels(dict(zip(POLICY, labels, strict=True)))
