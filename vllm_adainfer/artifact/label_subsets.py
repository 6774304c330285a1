"""Subsets of a policy's labels, as bits: bit j stands for the label in column j.

A request of a policy with a label pool names its own labels at run time; rows of one step have
different ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

MOST_LABELS = 62  # the bits of an int64 that are surely positive
ALL = -1


def bits_of(asked: Collection[int], label_ids: Sequence[int]) -> int:
    """The bits of the labels that are among the tokens `asked` for."""
    return sum(1 << column for column, token in enumerate(label_ids) if token in asked)


def mask_of(bits: Tensor, columns: Tensor) -> Tensor:
    """bool [rows, labels], True for the labels in the `bits`, int64 [rows], of each row.

    `columns` are 0, 1, ... as int64 [labels], on the same device.
    """
    return (bits.unsqueeze(1) >> columns) & 1 == 1


def restrict(scores: Tensor, subsets: Tensor | None) -> Tensor:
    """Scores [rows, labels or more] with -inf for labels outside each row's subset.

    Args:
        scores: their further columns, if any, stay as they are.
        subsets: bool [rows, labels]; None for all labels.

    """
    if subsets is None:
        return scores
    more = scores.shape[1] - subsets.shape[1]
    return scores.masked_fill(~torch.nn.functional.pad(subsets, (0, more), value=True), -torch.inf)
