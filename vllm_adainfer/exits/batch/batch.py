"""The batch that a loop runs: a protocol, so that the loop knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout


@dataclass(frozen=True)
class StackShape:
    """A model's stack of layers, cut into segments.

    Attributes:
        segment_layers: the number of layers in each segment. The last segment has only the last
            layer, or none, and ends with the final norm. If later layers share keys and values, it
            has any number of layers.
        head_size: the width of the LM head's input.
        own_kv_layers: the number of layers, the first ones, that write keys and values; a segment
            ends after them, and later layers read those of earlier ones. None: all write their own.

    """

    segment_layers: Sequence[int]
    head_size: int
    own_kv_layers: int | None = None

    @property
    def depth(self) -> int:
        """The number of layers."""
        return sum(self.segment_layers)

    @property
    def last_segment(self) -> int:
        """The index of the last segment."""
        return len(self.segment_layers) - 1

    @property
    def kv_layers(self) -> int:
        """The number of layers that write keys and values."""
        return self.depth if self.own_kv_layers is None else self.own_kv_layers

    @property
    def tail(self) -> int:
        """The index of the first segment that unsampled tokens can skip.

        If that is the last layer alone, they still need keys and values there.
        """
        if self.own_kv_layers is None:
            return self.last_segment
        return list(accumulate(self.segment_layers)).index(self.own_kv_layers) + 1

    @property
    def tail_layers(self) -> int:
        """The number of layers from the tail on."""
        return sum(self.segment_layers[self.tail :])

    def depth_after(self, segment: int) -> int:
        """The number of layers up to the end of a segment."""
        return sum(self.segment_layers[: segment + 1])


class Batch(Protocol):
    """Token rows that run the segments of a stack together.

    The first batch of a step has the rows that the step came with; later ones have other rows of
    the same requests.
    """

    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        """Run a segment; returns the rows' states, after the last segment [rows, head size].

        The next `run` may overwrite them.
        """

    def write_last_kv(self, states: HiddenStates) -> None:
        """Write the rows' keys and values in the last layer, from the states before that layer.

        `states` may be overwritten.
        """

    def compact(self, layout: RowLayout) -> Batch:
        """A batch of the rows in `layout`, which replaces this one."""

    def side_batch(self, layout: RowLayout, last_layer_only: bool = False) -> Batch:
        """A batch of the rows in `layout`, which runs while this one's states are kept.

        `last_layer_only`: it will run no layer but the last.
        """
