"""The recorder: keeps what calibration learns from while the layers run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from vllm_adainfer.policy.moments import Moments

# A decision row weighs as much as this many other rows of a prompt.
DECISION_ROW_WEIGHT = 64.0
# One in this many of a prompt's other rows is summed: more cost time and teach a lens little.
STRIDE = 3


class LensSums:
    """Sums for a lens at each layer: from the state there to its change until the last layer.

    Prompts are dealt to folds by their tag, so that each fold can be predicted from the others.
    """

    def __init__(self, layers: Sequence[int], folds: int, prompts: int) -> None:
        """Sum rows of requests with tags below `prompts`; the others are held out."""
        self._layers = layers
        self._folds = folds
        self._prompts = prompts
        self._moments: list[list[Moments]] = []

    def add(self, states: Sequence[Tensor], tags: Tensor, positions: Tensor, last: Tensor) -> None:
        """Add a step's rows; arguments as for `Recorder.record`, the last state is final.

        A prompt's first row is left out: it is an attention sink, its state is an outlier many
        times longer than any other, and no request for an answer ends there.
        """
        chosen = last | ((tags + positions) % STRIDE == 0) & (positions > 0)
        chosen &= (tags >= 0) & (tags < self._prompts)
        *inner, final = states
        size = final.shape[1]
        if not self._moments:
            self._moments = [[Moments.zeros(size, size) for _ in range(self._folds)] for _ in inner]
        for fold in range(self._folds):
            rows = torch.nonzero(chosen & (tags % self._folds == fold)).squeeze(1)
            weight = torch.where(last[rows], DECISION_ROW_WEIGHT, 1.0)
            target = final[rows].float()
            for state, moments in zip(inner, self._moments, strict=True):
                x = state[rows].float()
                moments[fold].add(x, target - x, weight)

    def take(self) -> dict[str, Tensor]:
        """The sums as ``lens.<layer>.<fold>.<field of Moments>``; then start over."""
        taken = {
            f"lens.{layer}.{fold}.{field.name}": getattr(moments, field.name)
            for layer, by_fold in zip(self._layers, self._moments, strict=False)
            for fold, moments in enumerate(by_fold)
            for field in fields(Moments)
        }
        self._moments = []
        return taken


class Recorder:
    """Keeps the states of decision rows; a request's tag is its line of the calibration data."""

    def __init__(self, layers: tuple[int, ...], lens: LensSums | None) -> None:
        """Record after `layers`, the last of which is the model's last; sum for `lens` too."""
        self.layers = layers
        self._lens = lens
        self._states: list[list[Tensor]] = [[] for _ in layers]
        self._tags: list[Tensor] = []
        self._positions: list[Tensor] = []

    def record(
        self, states: Sequence[Tensor], tags: Tensor, positions: Tensor, last: Tensor
    ) -> None:
        """Take in a step at full depth.

        Args:
            states: [rows, hidden size] after each of the recorded layers.
            tags: int64 [rows], of the row's request; a negative one is not recorded.
            positions: int64 [rows], of the row in its prompt.
            last: bool [rows], whether the row decides its request's answer.

        """
        decisions = last & (tags >= 0)
        self._tags.append(tags[decisions])
        self._positions.append(positions[decisions])
        for kept, state in zip(self._states, states, strict=True):
            kept.append(state[decisions])
        if self._lens is not None:
            self._lens.add(states, tags, positions, last)

    def take(self) -> dict[str, Tensor]:
        """Everything kept, in the order in which it came; then start over.

        ``layer.<n>`` [rows, hidden size], and int64 [rows] ``tags`` and ``positions`` of the rows.
        Also the sums for the lens, see `LensSums.take`.
        """
        taken = {} if self._lens is None else self._lens.take()
        for layer, states in zip(self.layers, self._states, strict=True):
            taken[f"layer.{layer}"] = torch.cat(states)
            states.clear()
        for name, kept in (("tags", self._tags), ("positions", self._positions)):
            taken[name] = torch.cat(kept)
            kept.clear()
        return taken
