"""A policy that lets nobody leave and keeps what it saw: the source of calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_adainfer.decision.policy import Decision


class Recorder:
    """Keeps the states of sampled rows; a request's tag is its row in the calibration data."""

    label_ids: Tensor | None = None

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.exit_points = layers
        self._states: list[list[Tensor]] = [[] for _ in layers]
        self._tags: list[list[Tensor]] = [[] for _ in layers]

    def decide(
        self, exit_index: int, hidden: Tensor, tags: Tensor, memory: Tensor | None
    ) -> Decision:
        """Keep `hidden` [rows, hidden size]; nothing is settled."""
        self._states[exit_index].append(hidden)
        self._tags[exit_index].append(tags)
        return Decision(torch.zeros(len(tags), dtype=torch.bool), None)

    def take(self) -> dict[str, Tensor]:
        """All that was kept, ``layer.<n>`` [rows, hidden size] in tag order; then start over."""
        taken = {}
        for layer, states, tags in zip(self.exit_points, self._states, self._tags, strict=True):
            order = torch.cat(tags).argsort()
            taken[f"layer.{layer}"] = torch.cat(states)[order]
            states.clear()
            tags.clear()
        return taken
