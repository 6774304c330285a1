"""Subsets of a policy's labels as bit masks: bit j stands for the label in column j.

With a label pool each request names its own labels, so the rows of one step differ in theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

MOST_LABELS = 62  # bits that leave an int64 positive
ALL = -1  # has every bit set


def bits_of(asked: Collection[int], label_ids: Sequence[int]) -> int:
    """The subset of the labels whose tokens are `asked` for."""
    return sum(1 << column for column, token in enumerate(label_ids) if token in asked)


def mask_of(bits: Tensor, columns: Tensor) -> Tensor:
    """bool [rows, labels], True for the labels in the subset of each row.

    `bits` are int64 [rows]; `columns` int64 [labels], 0, 1, ..., on the same device.
    """
    return (bits.unsqueeze(1) >> columns) & 1 == 1


def restrict(scores: Tensor, subsets: Tensor | None) -> Tensor:
    """`scores` with -inf for the labels outside each row's subset.

    Scores are [rows, labels or more]; columns after the labels stay as they are. Subsets are bool
    [rows, labels]; None for all labels.
    """
    if subsets is None:
        return scores
    more = scores.shape[1] - subsets.shape[1]
    return scores.masked_fill(~torch.nn.functional.pad(subsets, (0, more), value=True), -torch.inf)
