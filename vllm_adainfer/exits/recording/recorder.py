"""The recorder: keeps, while the layers run, what calibration learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType

import torch
from torch import Tensor

from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.exits.recording.state_files import StateFiles

# A decision row weighs as much as this many other rows of a prompt.
DECISION_ROW_WEIGHT = 64.0
# One in this many of a prompt's other rows is used: more take time and improve a lens little.
STRIDE = 3


class TunedLensSums:
    """Regression sums for a tuned lens (Belrose et al. 2023, arXiv 2303.08112) at each layer.

    The lens maps the state there to its change until the last layer. Prompts are split into folds
    by their record row, so that each fold can be predicted from the others.
    """

    def __init__(self, layers: Sequence[int], folds: int, prompts: int) -> None:
        """Use requests with record rows below `prompts`; the others are held out."""
        self._layers = layers
        self._folds = folds
        self._prompts = prompts
        self._moments: list[list[Moments]] = []

    def add(
        self, states: Sequence[Tensor], record_rows: Tensor, positions: Tensor, last: Tensor
    ) -> None:
        """Add a step's rows; arguments as for `Recorder.record`, the last state is final.

        A prompt's first row is left out: it is an attention sink, whose state is an outlier many
        times longer than any other, and no request is decided there.
        """
        chosen = last | ((record_rows + positions) % STRIDE == 0) & (positions > 0)
        chosen &= (record_rows >= 0) & (record_rows < self._prompts)
        *inner, final = states
        size = final.shape[1]
        if not self._moments:
            self._moments = [[Moments.zeros(size, size) for _ in range(self._folds)] for _ in inner]
        for fold in range(self._folds):
            rows = torch.nonzero(chosen & (record_rows % self._folds == fold)).squeeze(1)
            weight = torch.where(last[rows], DECISION_ROW_WEIGHT, 1.0)
            target = final[rows].float()
            for state, moments in zip(inner, self._moments, strict=True):
                x = state[rows].float()
                moments[fold].add(x, target - x, weight)

    def take(self) -> dict[str, Tensor]:
        """Return the sums as ``lens.<layer>.<fold>.<field of Moments>`` and start over."""
        taken = {
            f"lens.{layer}.{fold}.{field.name}": getattr(moments, field.name)
            for layer, by_fold in zip(self._layers, self._moments, strict=False)
            for fold, moments in enumerate(by_fold)
            for field in fields(Moments)
        }
        self._moments = []
        return taken


class Recorder:
    """Keeps the states of decision rows, and sums for a tuned lens if there is one to fit.

    Attributes:
        layers: those after which it records; the last one is the model's.
        files: of the states of whole prompts; None if they are not recorded.

    """

    def __init__(
        self, layers: tuple[int, ...], lens: TunedLensSums | None, files: StateFiles | None = None
    ) -> None:
        """Record after each of `layers`, which end with the model's last."""
        self.layers = layers
        self.files = files
        self._lens = lens
        self._states: list[list[Tensor]] = [[] for _ in layers]
        self._means: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._record_rows: list[Tensor] = []
        self._positions: list[Tensor] = []

    def record(
        self,
        states: Sequence[Tensor],
        record_rows: Tensor,
        positions: Tensor,
        last: Tensor,
        means: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        """Record a step at full depth.

        Args:
            states: [rows, hidden size] after each of the recorded layers.
            record_rows: int64 [rows], the line of the calibration data that the row's request
                belongs to; a negative one is not recorded.
            positions: int64 [rows], the position of the row in its prompt.
            last: bool [rows], whether the row decides its request's answer.
            means: layer -> fp32 [decision rows, hidden size], the mean of the prompt's normed
                states; NaN where some of them never ran. Empty if no means are recorded.

        """
        decisions = last & (record_rows >= 0)
        self._record_rows.append(record_rows[decisions])
        self._positions.append(positions[decisions])
        for kept, state in zip(self._states, states, strict=True):
            kept.append(state[decisions])
        for layer, mean in means.items():
            self._means[layer].append(mean)
        if self._lens is not None:
            self._lens.add(states, record_rows, positions, last)

    def take(self) -> dict[str, Tensor]:
        """Return everything kept, in order, and start over.

        ``layer.<n>`` [rows, hidden size], ``mean.<n>`` likewise if means are recorded, and int64
        [rows] ``tags`` (the record rows) and
        ``positions``. Also the sums for the lens, see `TunedLensSums.take`, and what
        `StateFiles.take` returns.
        """
        taken = {} if self._lens is None else self._lens.take()
        if self.files is not None:
            taken |= self.files.take()
        for layer, states in zip(self.layers, self._states, strict=True):
            taken[f"layer.{layer}"] = torch.cat(states)
            states.clear()
        for layer, means in self._means.items():
            if means:
                taken[f"mean.{layer}"] = torch.cat(means)
                means.clear()
        for name, kept in (("tags", self._record_rows), ("positions", self._positions)):
            taken[name] = torch.cat(kept)
            kept.clear()
        return taken
