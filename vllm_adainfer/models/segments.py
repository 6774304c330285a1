"""Segments: runs of stock decoder layers, each compiled on its own, with a decision between."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from vllm_adainfer import compat


class Segment(nn.Module):
    """Consecutive decoder layers; the first segment embeds, the last applies the final norm.

    The layers stay the model's: a segment borrows them, it owns no weights.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layers: Iterable[nn.Module],
        embed: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.num_layers = len(self.layers)


def segment_class(first: int, last: int, depth: int, normed: bool) -> type[Segment]:
    """A compiled class for layers `first` + 1 to `last` of `depth`, with the final norm or not.

    vLLM keys compiled code by the qualified name of ``forward``, so whatever changes the code
    must be in that name: while recording, the last layers end without the norm.
    """

    def forward(
        self: Segment,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.embed is not None:  # then they are token ids
            hidden_states = self.embed(hidden_states)
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        if self.norm is None:
            return hidden_states, residual
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states, None

    name = f"Segment_{first}_{last}_of_{depth}{'_normed' if normed else ''}"
    forward.__qualname__ = f"{name}.forward"
    compiled = support_torch_compile(
        dynamic_arg_dims={
            "positions": {0: "b"},
            "hidden_states": {0: "b"},
            "residual": {0: "b"},
        }
    )
    segment_class: type[Segment] = compiled(type(name, (Segment,), {"forward": forward}))
    return segment_class


def run_all(
    segments: Sequence[Segment], positions: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """All segments for all rows: final hidden states [rows, hidden size], normed."""
    hidden, residual = ids, None
    for segment in segments:
        hidden, residual = segment(positions, hidden, residual)
    return hidden


def build_segments(
    embed: nn.Module,
    layers: Sequence[nn.Module],
    norm: nn.Module,
    exit_points: Sequence[int],
    vllm_config: VllmConfig,
) -> tuple[Segment, ...]:
    """Cut the stack from `embed` to `norm` after each exit point (a count of layers run)."""
    depth = len(layers)
    config = compat.segment_config(vllm_config)
    cuts = [0, *exit_points, depth]
    segments = []
    for index, (first, last) in enumerate(itertools.pairwise(cuts)):
        is_last = index == len(exit_points)
        segments.append(
            segment_class(first, last, depth, normed=is_last)(
                vllm_config=config,
                layers=layers[first:last],
                embed=embed if index == 0 else None,
                norm=norm if is_last else None,
            )
        )
    return tuple(segments)
