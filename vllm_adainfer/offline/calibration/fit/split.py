"""Split: the prompts of a recording that fit a policy, and those that certify its bound."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adainfer.arrays import Ints


@dataclass(frozen=True)
class Split:
    """The prompts of a recording in two parts, each in random order.

    Attributes:
        fit: [prompts], the prompts for probes, classifiers and the choice of exit points.
        certify: [prompts], the held-out prompts: nothing but the bound uses them.
        groups: [all prompts], a number for each group of prompts that came together; groups are
            independent of each other, the prompts of one are not.

    """

    fit: Ints
    certify: Ints
    groups: Ints

    @classmethod
    def halves(cls, prompts: int) -> Split:
        """The first half of so many independent prompts fits, the rest certifies."""
        return cls.of_groups(np.arange(prompts))

    @classmethod
    def of_groups(cls, groups: Ints) -> Split:
        """The first half of the groups fits, the rest certifies; `groups` [prompts] ascend."""
        half = (groups[-1] + 1) // 2
        return cls(np.flatnonzero(groups < half), np.flatnonzero(groups >= half), groups)

    def most_together(self, groups: Ints) -> int:
        """The most prompts of one of `groups` [all prompts], in the half that fits."""
        return int(np.bincount(groups[self.fit]).max(initial=1))


def numbered(groups: Sequence[Hashable]) -> Ints:
    """int64 [prompts], the number of each prompt's group; groups count from 0 as they appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def random_order(groups: Ints, seed: int) -> Ints:
    """A permutation of the prompts, the order in which to record them: groups stay together.

    Recorded this way, the halves are drawn at random, and each stays in random order, which the
    bound of Waudby-Smith and Ramdas needs. `groups` [prompts] are as from `numbered`.
    """
    order = np.random.default_rng(seed).permutation(groups.max() + 1)
    return np.argsort(np.argsort(order)[groups], kind="stable")
