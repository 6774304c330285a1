"""Texts side by side in rows of one length, so that an encoder reads all of them without padding.

Each token attends to its own text alone, and its position is that in its text: the mask and the
positions say so, and both are inputs that encoders of transformers take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.transfers import upload

# Attention takes time by the square of a row's length; below this, each row's own cost counts more.
SHORTEST_ROW = 64


@dataclass(frozen=True)
class Packed:
    """Some texts in rows of one length; all tensors are on the device of the encoder.

    Attributes:
        texts: [texts], their places among all texts, in the order of their tokens here.
        tokens: int64 [rows, length]; 0 where a row has none left.
        positions: int64 [rows, length], each token's place in its text.
        mask: bool [rows, 1, length, length], which tokens each one attends to.
        real: int64 [tokens of all texts], the places of the tokens in the rows one after the other.
        lens: int64 [texts].

    """

    texts: Ints
    tokens: Tensor
    positions: Tensor
    mask: Tensor
    real: Tensor
    lens: Tensor

    def means(self, states: Tensor) -> Tensor:
        """fp32 [texts, width], the mean of the `states` [rows, length, width] of each text."""
        own = states.flatten(0, 1).index_select(0, self.real).float()
        return torch.segment_reduce(own, "mean", lengths=self.lens, unsafe=True)


def packed(texts: Sequence[Sequence[int]], device: torch.device) -> Iterator[Packed]:
    """`texts`, none of them empty, in rows: those of about the same length together."""
    lens = np.array([len(text) for text in texts])
    rows = _rows(lens)
    for length in sorted({most for most, _ in rows}):
        yield _packed(texts, lens, [row for most, row in rows if most == length], device)


def _rows(lens: Ints) -> list[tuple[int, list[int]]]:
    """The texts of each row, and how many tokens there is room for.

    The longest text comes first, and each goes where there is room for it first.
    """
    rows: list[tuple[int, list[int]]] = []
    room: list[int] = []
    for text in np.argsort(-lens, kind="stable").tolist():
        needed = int(lens[text])
        place = next((n for n, left in enumerate(room) if left >= needed), len(rows))
        if place == len(rows):
            most = SHORTEST_ROW
            while most < needed:
                most *= 2
            rows.append((most, []))
            room.append(most)
        rows[place][1].append(text)
        room[place] -= needed
    return rows


def _packed(
    texts: Sequence[Sequence[int]], lens: Ints, rows: Sequence[list[int]], device: torch.device
) -> Packed:
    """Rows of texts, of `lens` tokens, as long as the longest row."""
    length = max(int(lens[row].sum()) for row in rows)
    tokens, positions = np.zeros((2, len(rows), length), dtype=np.int64)
    owner = np.full((len(rows), length), -1)
    for number, row in enumerate(rows):
        end = int(lens[row].sum())
        tokens[number, :end] = np.concatenate([texts[text] for text in row])
        owner[number, :end] = np.repeat(row, lens[row])
        positions[number, :end] = np.concatenate([np.arange(lens[text]) for text in row])
    order = np.concatenate(rows)
    shaped = tokens, positions, owner
    given = *(one.ravel() for one in shaped), np.flatnonzero(owner >= 0), lens[order]
    *flat, real, own_lens = upload(given, device)
    read, places, owners = (one.view(owner.shape) for one in flat)
    mask = (owners.unsqueeze(2) == owners.unsqueeze(1)).unsqueeze(1)
    return Packed(order, read, places, mask, real, own_lens)
