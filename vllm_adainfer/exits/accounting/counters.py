"""Counters of executed work, in token-layers: one token through one layer.

They are counted where layers execute.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_adainfer.promise.probabilities import MOVES
from vllm_adainfer.settings.engine import DEFAULT_POLICY, NO_POLICY
from vllm_adainfer.watch.watch import Watch

LabelPromise = tuple[float, str, str]  # the level's epsilon, the kind of promise, its label


@dataclass
class PolicyStats:
    """The work of tokens that came under one policy. No counter ever falls.

    At any time, token-layers run, skipped and still waiting add up to those possible, see
    `LayerAccounting`.

    Attributes:
        layers_run: token-layers executed.
        layers_skipped: token-layers that will never be executed.
        layers_deferred: token-layers that wait until their request needs them, and are then run or
            skipped; counted each time that a token begins to wait.
        layers_possible: token-layers that full depth would have executed.
        exit_histogram: sampled tokens by the number of layers they ran.
        shadow_checked: early answers compared with full depth, by epsilon; of policies that promise
            the first documents of queries, queries. (A monitor counts only those of the artifact
            that serves now.)
        shadow_disagreed: those that differed, whose probabilities moved too far, or that lost a
            document.
        labels_checked: answers that a promise about one label is about, by epsilon, kind of promise
            and label.
        labels_changed: those of them that differed.
        not_covered: requests for the policy's output that it does not serve because of their
            prompts, by `NotCovered`.
        shadow_moves: answers of policies that promise probabilities or first documents, by the
            largest move of one probability, rounded up to one of `MOVES`.

    """

    layers_run: int = 0
    layers_skipped: int = 0
    layers_deferred: int = 0
    layers_possible: int = 0
    exit_histogram: Counter[int] = field(default_factory=Counter)
    shadow_checked: Counter[float] = field(default_factory=Counter)
    shadow_disagreed: Counter[float] = field(default_factory=Counter)
    labels_checked: Counter[LabelPromise] = field(default_factory=Counter)
    labels_changed: Counter[LabelPromise] = field(default_factory=Counter)
    shadow_moves: Counter[float] = field(default_factory=Counter)
    not_covered: Counter[str] = field(default_factory=Counter)

    def moved(self, moves: Iterable[float]) -> None:
        """Count answers by their largest move, each from 0 to 1."""
        self.shadow_moves.update(MOVES[bisect_left(MOVES, move)] for move in moves if move <= 1)

    def queries_counted(self, queries: Iterable[tuple[float, int, int]]) -> None:
        """Count queries, and those that lost a document, by epsilon."""
        for epsilon, checked, lost in queries:
            self.shadow_checked[epsilon] += checked
            self.shadow_disagreed[epsilon] += lost

    @property
    def work(self) -> dict[str, int]:
        """Token-layers by what became of them."""
        return {
            "layers_run": self.layers_run,
            "layers_skipped": self.layers_skipped,
            "layers_deferred": self.layers_deferred,
        }

    def as_dict(self) -> dict[str, Any]:
        """The counters of layers and of requests that are not served, as plain values."""
        return {
            **self.work,
            "layers_possible": self.layers_possible,
            "exit_histogram": dict(sorted((+self.exit_histogram).items())),
            "not_covered": dict(self.not_covered),
        }


@dataclass
class ExitStats:
    """The work of one engine since it started.

    Attributes:
        tokens_decided: tokens sampled, at any depth.
        passes_run: executed layers, each counted once per batch: it reads its weights once.
        passes_possible: the same at full depth.
        seconds: time in the stack by the host's clock, on a CPU; elsewhere 0.
        probe_seconds: the part of it that policies took to decide.
        by_policy: all other counters, by policy; `NO_POLICY` is for requests that may not exit.
        serving: names of the policies that serve now, and `NO_POLICY`.
        weights_differ: whether no request may exit, as these are other weights than in calibration.
        failed_parts: what the self-test on this device has switched off, see `self_test`.
        not_tested: why the self-test could not test the layers on this device; empty otherwise.
        shadow: the monitors, by policy; empty (and no key in `as_dict`) where there are none.
        changed_at_most: the most answers that were changed, by the ledger of each policy.
        all_changed_at_most: the same of all kinds together; None without ledgers, or if one of them
            was damaged.

    """

    tokens_decided: int = 0
    passes_run: int = 0
    passes_possible: int = 0
    seconds: float = 0.0
    probe_seconds: float = 0.0
    weights_differ: bool = False
    failed_parts: tuple[str, ...] = ()
    not_tested: str = ""
    by_policy: defaultdict[str, PolicyStats] = field(
        default_factory=lambda: defaultdict(PolicyStats)
    )
    serving: Sequence[str] = (NO_POLICY,)
    shadow: Mapping[str, Watch] = field(default_factory=dict)
    changed_at_most: Mapping[str, float] = field(default_factory=dict)
    all_changed_at_most: float | None = None

    @property
    def layers_run(self) -> int:
        """Token-layers executed."""
        return sum(policy.layers_run for policy in self.by_policy.values())

    @property
    def layers_possible(self) -> int:
        """Token-layers that full depth would have executed."""
        return sum(policy.layers_possible for policy in self.by_policy.values())

    @property
    def exit_histogram(self) -> Counter[int]:
        """Sampled tokens by the number of layers they ran."""
        return sum((policy.exit_histogram for policy in self.by_policy.values()), Counter())

    def as_dict(self) -> dict[str, Any]:
        """All counters as plain values, which can cross a process border."""
        counters: dict[str, Any] = {
            "tokens_decided": self.tokens_decided,
            "layers_run": self.layers_run,
            "layers_possible": self.layers_possible,
            "passes_run": self.passes_run,
            "passes_possible": self.passes_possible,
            "weights_differ": self.weights_differ,
            "failed_parts": list(self.failed_parts),
            "not_tested": self.not_tested,
            "exit_histogram": dict(sorted(self.exit_histogram.items())),
            "policies": {name: own.as_dict() for name, own in self.by_policy.items()},
        }
        if self.shadow:
            shadow = {name: monitor.as_dict() for name, monitor in self.shadow.items()}
            counters["shadow"] = shadow.get(DEFAULT_POLICY, shadow)
            for name in shadow.keys() & self.by_policy.keys():
                counters["policies"][name]["shadow"] = shadow[name]
        return counters
