"""The states of all tokens of each prompt, in files that are read as they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints


@dataclass(frozen=True)
class OwnStates:
    """The states that branches read, see `PooledPrompts.read_states`.

    Attributes:
        rows: layer -> [tokens of all prompts, hidden size], the residual stream.
        starts: [prompts], the first row of each.
        ends: [prompts], the row after its last.

    """

    rows: Mapping[int, Tensor]
    starts: Ints
    ends: Ints

    def of(self, layer: int, prompts: Ints) -> list[Tensor]:
        """The states after `layer` [tokens, hidden size] of each of `prompts`, not yet read."""
        spans = zip(self.starts[prompts].tolist(), self.ends[prompts].tolist(), strict=True)
        return [self.rows[layer][start:end] for start, end in spans]


def own_states_of(
    files: Mapping[int, str], sums: Mapping[str, Tensor], like: Tensor, prompts: int
) -> OwnStates | None:
    """Those in `files`, by layer, of so many prompts; None if there are no files.

    A prompt without tokens of its own has none. Files that are deleted then live on until these
    states are dropped. `sums` are from `StateFiles.take`; a state has the width and dtype of `like`
    [rows, hidden size].
    """
    if not files:
        return None
    tags, lens = sums["states.tags"].numpy(), sums["states.lens"].numpy()
    starts, ends = np.zeros((2, prompts), dtype=np.int64)
    ends[tags] = np.cumsum(lens)
    starts[tags] = ends[tags] - lens
    rows, tokens = {}, int(lens.sum())
    for layer, file in files.items():
        width, flat = like.shape[1], like.new_empty(0)
        if tokens:  # an empty file cannot be mapped
            flat = torch.from_file(file, size=tokens * width, dtype=like.dtype)
        rows[layer] = flat.view(tokens, width)
    return OwnStates(rows, starts, ends)
