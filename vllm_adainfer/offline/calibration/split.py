"""Split: which prompts of a recording fit a policy, and which certify its bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_adainfer.offline.calibration.collect import Ints, Recording


@dataclass(frozen=True)
class Split:
    """The prompts of a recording in two parts, each in random order.

    Attributes:
        fit: [prompts], for probes, classifiers and the choice of exit points.
        certify: [prompts], held out: nothing but the bound reads them.

    """

    fit: Ints
    certify: Ints

    @classmethod
    def halves(cls, prompts: int) -> Split:
        """The first half of so many prompts fits, the rest certifies."""
        return cls(np.arange(prompts // 2), np.arange(prompts // 2, prompts))

    def fit_rows(self, recording: Recording) -> Ints:
        """Decision rows of the prompts that fit."""
        return recording.rows_of(self.fit)

    def certify_rows(self, recording: Recording) -> Ints:
        """Decision rows of the held-out prompts."""
        return recording.rows_of(self.certify)


def random_order(prompts: int, seed: int) -> Ints:
    """A permutation of so many prompts: the order in which to record them.

    Recorded this way, the halves are drawn at random, and each stays in random order, which the
    bound of Waudby-Smith and Ramdas needs.
    """
    return np.random.default_rng(seed).permutation(prompts)
