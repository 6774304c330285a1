"""Segments: runs of stock decoder layers, each compiled on its own, with a decision between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from vllm_adainfer import compat

# (layer, positions, hidden states, residual, rows) -> hidden states and residual of `rows` alone
LayerForRows = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

ROWS = {0: "b"}  # dynamic dimension: the batch's token rows


class Segment(nn.Module):
    """Consecutive decoder layers; the first segment embeds.

    The layers stay the model's: a segment borrows them, it owns no weights.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layers: Iterable[nn.Module],
        embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.num_layers = len(self.layers)


class LastSegment(nn.Module):
    """The last layer, of which most rows need K and V alone, and the final norm.

    Without a layer it is the norm.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer: nn.Module | None,
        norm: nn.Module,
        layer_for_rows: LayerForRows,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.layer_for_rows = layer_for_rows
        self.num_layers = int(layer is not None)


@dataclass(frozen=True)
class Stack:
    """A model's layers in segments: `segments` in turn, then `last`."""

    segments: tuple[Segment, ...]
    last: LastSegment

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return sum(segment.num_layers for segment in self.segments) + self.last.num_layers

    def profile(self, positions: Tensor, ids: Tensor) -> Tensor:
        """A pass that belongs to no request: states [rows, hidden size], half of them left zero.

        The last segment gets fewer rows than the others, or the compiler would take both numbers
        for one.
        """
        hidden, residual = ids, None
        for segment in self.segments:
            hidden, residual = segment(positions, hidden, residual)
        rows = torch.arange(0, ids.shape[0], 2, device=ids.device)
        whole = torch.zeros_like(hidden)
        whole[rows] = self.last(positions, hidden, residual, rows)
        return whole


def segment_class(first: int, last: int, depth: int) -> type[Segment]:
    """A compiled class for layers `first` + 1 to `last` of `depth`.

    vLLM keys compiled code by the qualified name of ``forward``, so whatever changes the code
    must be in that name.
    """

    def forward(
        self: Segment, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.embed is not None:  # then they are token ids
            hidden_states = self.embed(hidden_states)
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual

    name = f"Segment_{first}_{last}_of_{depth}"
    forward.__qualname__ = f"{name}.forward"
    compiled = support_torch_compile(
        dynamic_arg_dims={"positions": ROWS, "hidden_states": ROWS, "residual": ROWS}
    )
    segment_class: type[Segment] = compiled(type(name, (Segment,), {"forward": forward}))
    return segment_class


def last_segment_class(depth: int, num_layers: int) -> type[LastSegment]:
    """A compiled class for the last layer of `depth` (or none) and the norm."""

    def forward(
        self: LastSegment,
        positions: Tensor,
        hidden_states: Tensor,
        residual: Tensor,
        rows: Tensor,
    ) -> Tensor:
        if self.layer is None:
            hidden_states, residual = hidden_states[rows], residual[rows]
        else:
            hidden_states, residual = self.layer_for_rows(
                self.layer, positions, hidden_states, residual, rows
            )
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states

    name = f"LastSegment_{num_layers}_of_{depth}"
    forward.__qualname__ = f"{name}.forward"
    compiled = support_torch_compile(
        dynamic_arg_dims={
            "positions": ROWS,
            "hidden_states": ROWS,
            "residual": ROWS,
            "rows": {0: "r"},
        }
    )
    last_class: type[LastSegment] = compiled(type(name, (LastSegment,), {"forward": forward}))
    return last_class


def build_stack(
    embed: nn.Module,
    layers: Sequence[nn.Module],
    norm: nn.Module,
    cuts: Sequence[int],
    layer_for_rows: LayerForRows,
    vllm_config: VllmConfig,
) -> Stack:
    """Cut the stack from `embed` to `norm` after each of `cuts` (counts of layers run).

    The last layer is cut off, too; a cut after it leaves the norm alone.
    """
    depth = len(layers)
    config = compat.segment_config(vllm_config)
    cuts = sorted({*cuts, max(depth - 1, *cuts)})
    segments = tuple(
        segment_class(first, last, depth)(
            vllm_config=config, layers=layers[first:last], embed=embed if first == 0 else None
        )
        for first, last in itertools.pairwise([0, *cuts])
    )
    rest = layers[cuts[-1] :]
    last = last_segment_class(depth, len(rest))(
        vllm_config=config,
        layer=rest[0] if rest else None,
        norm=norm,
        layer_for_rows=layer_for_rows,
    )
    return Stack(segments, last)
