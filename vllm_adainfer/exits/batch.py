"""The batch that an exit loop runs on: a protocol, so that the loop does not know vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from vllm_adainfer.exits.hidden_states import HiddenStates
from vllm_adainfer.exits.layout import RowLayout


@dataclass(frozen=True)
class StackShape:
    """A model's stack of layers, cut into segments.

    Attributes:
        segment_layers: the number of layers in each segment. The last segment has the last layer
            alone, or none, and ends with the final norm. If later layers share keys and values, it
            has any number of layers.
        head_size: width of what the LM head reads.
        own_kv_layers: so many layers, the first ones, write keys and values, and a segment ends
            after them; those that follow read an earlier layer's. None: all write their own.

    """

    segment_layers: Sequence[int]
    head_size: int
    own_kv_layers: int | None = None

    @property
    def depth(self) -> int:
        """Layers in all."""
        return sum(self.segment_layers)

    @property
    def last_segment(self) -> int:
        """Index of the last segment."""
        return len(self.segment_layers) - 1

    @property
    def kv_layers(self) -> int:
        """How many layers write keys and values."""
        return self.depth if self.own_kv_layers is None else self.own_kv_layers

    @property
    def tail(self) -> int:
        """Index of the first segment that rows which decide nothing have no need of.

        At most they still want keys and values in the last layer.
        """
        if self.own_kv_layers is None:
            return self.last_segment
        return list(accumulate(self.segment_layers)).index(self.own_kv_layers) + 1

    @property
    def tail_layers(self) -> int:
        """Layers from there on."""
        return sum(self.segment_layers[self.tail :])


class Batch(Protocol):
    """Token rows that run the segments of a stack together.

    A batch is made for one step, with the rows that the step came with. Later batches of the same
    step have other rows of the same requests.
    """

    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        """The rows' states after a segment; after the last one, [rows, head size].

        The states returned may be overwritten by the next `run`.
        """

    def write_last_kv(self, states: HiddenStates) -> None:
        """Write the rows' keys and values in the last layer, from the states before that layer.

        `states` may be overwritten.
        """

    def fill_kv(self, exit_index: int, states: Tensor, layout: RowLayout) -> None:
        """Write keys and values in all layers below an exit point, made of the states at it.

        Args:
            exit_index: which exit point.
            states: [rows, hidden size].
            layout: whose rows these are, and at which positions.

        """

    def narrowed(self, layout: RowLayout) -> Batch:
        """The batch of the rows in `layout`, which takes the place of this one."""

    def beside(self, layout: RowLayout, runs_last_layer_alone: bool = False) -> Batch:
        """A batch of the rows in `layout`, which runs while the states of this one are kept.

        Args:
            layout: whose rows these are, and at which positions.
            runs_last_layer_alone: whether no other layer will be run on it.

        """
