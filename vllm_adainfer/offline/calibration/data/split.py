"""Split: the prompts of a recording that fit a policy, and those that certify its bound."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.offline.calibration.data.examples import Example


@dataclass(frozen=True)
class Split:
    """The prompts of a recording in two parts, each in random order.

    Attributes:
        fit: [prompts], the prompts for probes, classifiers and the choice of exit points.
        certify: [prompts], the held-out prompts: nothing but the bound uses them.
        groups: [all prompts], a number for each group of prompts that came together; groups are
            independent of each other, the prompts of one are not.
        alike: [all prompts], the same number for groups that ask the same, see `alike_of`; None if
            no two of them do.

    """

    fit: Ints
    certify: Ints
    groups: Ints
    alike: Ints | None = None

    @classmethod
    def halves(cls, prompts: int) -> Split:
        """The first half of so many independent prompts fits, the rest certifies."""
        return cls.of_groups(np.arange(prompts))

    @classmethod
    def of_groups(
        cls, groups: Ints, held_out: int | None = None, alike: Ints | None = None
    ) -> Split:
        """The last `held_out` groups certify, the others fit; None holds out half of them.

        `groups` [prompts] ascend; so does `alike`, whose groups count as one.
        """
        units = groups if alike is None else alike
        count = units[-1] + 1
        fitting = count // 2 if held_out is None else count - held_out
        return cls(np.flatnonzero(units < fitting), np.flatnonzero(units >= fitting), groups, alike)

    @property
    def units(self) -> Ints:
        """[all prompts], a number for each group with all that ask the same: never torn apart."""
        return self.groups if self.alike is None else self.alike

    @property
    def repeats(self) -> Bools | None:
        """[all prompts], whether a prompt's group repeats an earlier one; None if none does."""
        if self.alike is None:
            return None
        _, first = np.unique(self.alike, return_index=True)
        repeats: Bools = self.groups != self.groups[first][self.alike]
        return repeats

    def most_together(self, groups: Ints) -> int:
        """The most prompts of one of `groups` [all prompts], in the part that fits."""
        return int(np.bincount(groups[self.fit]).max(initial=1))


def numbered(groups: Sequence[Hashable]) -> Ints:
    """int64 [prompts], the number of each prompt's group; groups count from 0 as they appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def groups_of(examples: Sequence[Example]) -> Ints:
    """[prompts], numbers of the groups that came together; most prompts come alone."""
    return numbered(
        [index if one.group is None else one.group for index, one in enumerate(examples)]
    )


def alike_of(examples: Sequence[Example], groups: Ints) -> Ints | None:
    """[prompts], the same number for groups that ask the same; None if no two do.

    They ask the same if they have the same prompts, token by token, with the same answers to choose
    from. `groups` [prompts] are as from `groups_of`.
    """
    asked: dict[int, set[Hashable]] = {}
    for group, one in zip(groups.tolist(), examples, strict=True):
        asked.setdefault(group, set()).add((tuple(one.token_ids), one.labels, one.choices))
    whole = {group: frozenset(prompts) for group, prompts in asked.items()}
    if len(set(whole.values())) == len(whole):
        return None
    return numbered([whole[group] for group in groups.tolist()])


def random_order(groups: Ints, seed: int) -> Ints:
    """A permutation of the prompts, the order in which to record them: groups stay together.

    Recorded this way, the halves are drawn at random, and each stays in random order, which the
    bound of Waudby-Smith and Ramdas needs. `groups` [prompts] are as from `numbered`.
    """
    order = np.random.default_rng(seed).permutation(groups.max() + 1)
    return np.argsort(np.argsort(order)[groups], kind="stable")
