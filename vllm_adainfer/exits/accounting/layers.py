"""Token-layers by policy, as they are run, skipped for good, or deferred.

A token counts for the policy that its request came under, even when it runs layers in a later step
in which the request comes under another. So for each policy, at any time,

    run + skipped + still waiting = submitted tokens x layers

and no counter ever falls. Tokens that wait are those that the KV policy holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.exits.accounting.counters import ExitStats, PolicyStats

Tokens: TypeAlias = Sequence[tuple[PolicyStats, int]]  # how many each policy has


class LayerAccounting:
    """Counts an engine's token-layers in `stats`.

    Policies are numbered once and for all: a number outlives the policy, whose tokens may wait.
    """

    def __init__(self, stats: ExitStats, names: Sequence[str]) -> None:
        """Start with the policies `names`; see `use_names`."""
        self.stats = stats
        self._names: list[str] = []
        self.use_names(names)

    def use_names(self, names: Sequence[str]) -> None:
        """Policies have come or gone: owners are indices into `names` from now on."""
        self._names += [name for name in names if name not in self._names]
        self._numbers = np.array([self._names.index(name) for name in names])

    def numbers(self, owners: Ints) -> Ints:
        """The policies of `owners`, as they are numbered here."""
        numbers: Ints = self._numbers[owners]
        return numbers

    def tokens(self, policies: Ints, num_tokens: Ints | None = None) -> Tokens:
        """How many tokens each policy has, by the policy of each token, or of each request.

        `num_tokens` is then the number of tokens of each request.
        """
        counts = np.bincount(policies, num_tokens)
        return [
            (self.stats.by_policy[self._names[policy]], int(counts[policy]))
            for policy in np.flatnonzero(counts).tolist()
        ]

    def submitted(self, tokens: Tokens, layers: int) -> None:
        """A step submits `tokens` to a model with so many layers."""
        self.stats.passes_possible += layers
        for policy, count in tokens:
            policy.layers_possible += count * layers

    def ran(self, tokens: Tokens, layers: int, batches: int = 1) -> None:
        """`tokens` have run so many layers, in so many batches."""
        self.stats.passes_run += layers * batches
        for policy, count in tokens:
            policy.layers_run += count * layers

    def skipped(self, tokens: Tokens, layers: int) -> None:
        """`tokens` never run so many layers."""
        for policy, count in tokens:
            policy.layers_skipped += count * layers

    def deferred(self, tokens: Tokens, layers: int) -> None:
        """`tokens` wait, and will run or skip so many layers."""
        for policy, count in tokens:
            policy.layers_deferred += count * layers

    def decided(self, policies: Ints, depth: int) -> None:
        """Tokens of `policies` were decided after `depth` layers."""
        for policy, count in self.tokens(policies):
            policy.exit_histogram[depth] += count
