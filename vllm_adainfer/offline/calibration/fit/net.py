"""The net of a student or a branch as it is trained: an encoder and a head, read in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.text_encoders import TextEncoder, multiplies_bfloat16

BATCH = 16
SORTED = 8  # batches are of inputs of about the same length, out of so many batches at a time


class Net(nn.Module):
    """An encoder with a head, as training sees them; it reads inputs that have a length."""

    def __init__(self, encoder: StateEncoder | TextEncoder, taught: Taught) -> None:
        """Put an untrained head for what is `taught` on `encoder`."""
        super().__init__()
        self.encoder = encoder.eval()  # no dropout: threads share the random numbers
        self.head = nn.Linear(encoder.width, taught.labels.shape[1] + (taught.mass is not None))

    def score(self, inputs: Sequence[Any], rows: Ints) -> Tensor:
        """Scores of some rows, fp32 [rows, labels, and one for the mass if it is taught]."""
        with mixed_precision():
            read = self.encoder([inputs[row] for row in rows.tolist()])
            scores: Tensor = self.head(read)
        return scores.float()


def mixed_precision() -> torch.autocast:
    """Training multiplies in bfloat16 on processors that do so themselves.

    Others emulate it: with AVX2 alone a step then takes 40 times as long as in fp32, with AVX-512 4
    times.
    """
    in_bfloat16 = multiplies_bfloat16(torch.device("cpu"))
    return torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16)


@torch.no_grad()
def scores_of(net: Net, inputs: Sequence[Any], rows: Ints) -> Tensor:
    """`Net.score` of any number of `rows`."""
    found = torch.zeros(len(rows), len(net.head.bias))
    order = np.argsort([len(inputs[row]) for row in rows.tolist()], kind="stable")
    for places in batches(order, BATCH):
        found[torch.from_numpy(places)] = net.score(inputs, rows[places])
    return found


def batches(rows: Ints, size: int) -> Iterator[Ints]:
    """The rows in their order, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def mixed_batches(
    inputs: Sequence[Any], order: np.random.Generator, rows: Ints, size: int
) -> list[Ints]:
    """All of `rows` in random batches of `size`, each of inputs of about the same length."""
    rows = order.permutation(rows)
    found: list[Ints] = []
    for start in range(0, len(rows), size * SORTED):
        some = rows[start : start + size * SORTED]
        lens = [len(inputs[row]) for row in some.tolist()]
        found += batches(some[np.argsort(lens, kind="stable")], size)
    return [found[place] for place in order.permutation(len(found))]


def steps_of(rows: Ints, size: int) -> int:
    """The number of batches of `size` in one epoch."""
    return math.ceil(len(rows) / size)
