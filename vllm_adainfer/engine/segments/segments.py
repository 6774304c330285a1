"""Segments: runs of stock decoder layers, compiled separately, with decisions between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    override_forward_context,
)

from vllm_adainfer.engine.compat.attention import write_kv
from vllm_adainfer.engine.compat.compilation import (
    compile_cache_folder,
    segment_config,
    share_compiled_graphs,
)
from vllm_adainfer.engine.segments.decoder import Decoder, KVProjection, Layer
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates, StateMemory

ROWS = {0: "b"}  # the dynamic dimension: token rows


class CompiledPart(nn.Module):
    """A part of the model that vLLM compiles separately; parts with equal graphs share the code."""

    def aot_compile(self, *args: Any, **settings: Any) -> Any:
        """Compile ahead of time, as vLLM does by default on GPUs."""
        share_compiled_graphs()
        return super().aot_compile(*args, **settings)  # type: ignore[misc]


class Segment(CompiledPart):
    """Consecutive decoder layers, perhaps none. The first embeds, the last applies the final norm.

    The model owns the layers; a segment only refers to them.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        decoder: type[Decoder],
        body: nn.Module,
        layers: Iterable[nn.Module],
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.body = body
        self.layers = nn.ModuleList(layers)


class LastKV(CompiledPart):
    """Keys and values of the last layer, for rows that need nothing else of it."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", projection: KVProjection
    ) -> None:
        super().__init__()
        self.projection = projection


class FixedStates:
    """Where the graphs of segments read states and positions: all but those of the first segment.

    vLLM captures each compiled module as if no other graph read its output: the output's memory
    returns to the shared pool, so the next segment's graphs could be captured on top of their own
    input (vLLM 0.32: ``weak_ref_output`` in `compilation/backends.py`; its own model of several
    compiled parts copies between them, `models/gemma3n.py`). Segments run one after the other, so
    all share this memory. Any rows of a step can be put there, padded to a captured size, as vLLM
    does for its own model that runs some layers on a subset of rows
    (`models/deepseek_v41/nvidia/decoder_replay_cudagraph.py`).

    Attributes:
        captured: the numbers of rows that there are graphs for.

    """

    def __init__(self, rows: int) -> None:
        """Allocate lazily for up to `rows` rows, the largest batch that vLLM captures."""
        self.captured: set[int] = set()
        self._rows = rows
        self._memory = StateMemory(rows)
        self._positions: Tensor | None = None

    def size_for(self, rows: int) -> int | None:
        """The smallest captured size for so many rows; None if there is none."""
        return min((size for size in self.captured if size >= rows), default=None)

    def put(self, states: HiddenStates, rows: int) -> HiddenStates:
        """`states` there, unless all parts of them are; with padding up to `rows`."""
        memory = self._memory.like(states)
        here, there = ([p.data_ptr() for p in s.parts if p is not None] for s in (states, memory))
        if here != there:
            memory.put(states, slice(0, states.num_rows))
        return memory.rows(slice(0, rows))

    def put_positions(self, positions: Tensor) -> None:
        """Copy in the positions [rows] of the rows that segments are about to run."""
        if self._positions is None:
            self._positions = positions.new_zeros(self._rows)
        self._positions[: len(positions)] = positions

    def positions_of(self, rows: int) -> Tensor:
        """[rows], what `put_positions` has put there; padding has those of some earlier rows."""
        assert self._positions is not None, "the first segment has run"
        return self._positions[:rows]


@dataclass(frozen=True)
class Stack:
    """A model's layers in segments.

    Attributes:
        segments: the segments in order. The last one has the final norm, and at most one layer
            unless later layers share keys and values.
        last_kv: computes keys and values of the last layer; None if the last segment has no layer,
            or a layer that shares another's.
        shape: what the exit loop needs to know of them.
        fixed_states: memory that graphs read states between segments from.

    """

    segments: tuple[Segment, ...]
    last_kv: LastKV | None
    shape: StackShape
    fixed_states: FixedStates

    def run(self, index: int, positions: Tensor, states: HiddenStates) -> HiddenStates:
        """The hidden states after a segment; [rows, head size] after the last one."""
        replays = get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        fixed, is_last = self.fixed_states, index == len(self.segments) - 1
        if replays and index > 0:
            states = fixed.put(states, states.num_rows)
            positions = fixed.positions_of(states.num_rows)
        hidden, residual, per_layer = self.segments[index](positions, *states.parts)
        after = HiddenStates(hidden, residual, states.per_layer if per_layer is None else per_layer)
        if not replays or is_last:
            return after
        if index == 0:
            fixed.put_positions(positions)
        return fixed.put(after, after.num_rows)

    @property
    def last_layer(self) -> str:
        """The name of the last layer's attention."""
        assert self.last_kv is not None, "the last segment has no layer"
        name: str = self.last_kv.projection.attention.layer_name
        return name

    def write_last_kv(
        self, positions: Tensor, states: HiddenStates, slots: dict[str, Tensor]
    ) -> None:
        """Write keys and values of the last layer to `slots`, int64 [rows] by layer name.

        `states` is that layer's input. It may be overwritten.
        """
        assert self.last_kv is not None, "the last segment has no layer"
        keys, values = self.last_kv(positions, *states.stream)
        attention = self.last_kv.projection.attention
        write_kv(attention, keys, values, slots[attention.layer_name])

    def run_all(self, positions: Tensor, ids: Tensor, with_last_kv: bool = False) -> Tensor:
        """All layers for all rows, [rows, head size].

        `with_last_kv`: also run `last_kv`, as in passes without requests, in which vLLM profiles
        and captures piecewise graphs. Only sizes that it has captured there may be replayed for
        other rows: vLLM 0.32 would capture another one in the middle of a step, and a capture
        computes nothing.
        """
        states = HiddenStates(ids)
        mode = get_forward_context().cudagraph_runtime_mode
        if with_last_kv and mode == CUDAGraphMode.PIECEWISE:
            self.fixed_states.captured.add(states.num_rows)
        for index in range(len(self.segments) - 1):
            states = self.run(index, positions, states)
        if with_last_kv and self.last_kv is not None:  # on a copy, which may be overwritten
            with override_forward_context(without_graphs(get_forward_context())):
                self.last_kv(positions, *states.clone().stream)
        return self.run(len(self.segments) - 1, positions, states).hidden


def without_graphs(context: ForwardContext) -> ForwardContext:
    """`context` with CUDA graphs off."""
    return replace(context, cudagraph_runtime_mode=CUDAGraphMode.NONE, batch_descriptor=None)


def segment_class(first: int, last: int, depth: int, embeds: bool, finishes: bool) -> type[Segment]:
    """A compiled class for layers `first` + 1 to `last` of `depth`.

    vLLM caches compiled code by the qualified name of ``forward``, so the name states everything
    that changes the code.
    """

    def forward(
        self: Segment,
        positions: Tensor,
        hidden_states: Tensor,
        residual: Tensor | None,
        per_layer: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if embeds:
            ids = hidden_states
            hidden_states = self.decoder.embed(self.body, ids, positions)
            per_layer = self.decoder.per_layer_inputs(self.body, ids, hidden_states)
        for number, layer in enumerate(self.layers, start=first):
            given: Layer = layer
            if per_layer is not None:
                given = self.decoder.given(layer, per_layer[:, number])
            hidden_states, residual = self.decoder.run_layer(
                given, positions, hidden_states, residual
            )
        if finishes:
            return self.decoder.finish(self.body, hidden_states, residual), None, None
        return hidden_states, residual, per_layer if embeds else None

    does = "_embeds" * embeds + "_finishes" * finishes
    name = f"Segment_{first}_{last}_of_{depth}{does}"
    forward.__qualname__ = f"{name}.forward"
    rows = dict.fromkeys(("positions", "hidden_states", "residual", "per_layer"), ROWS)
    compiled = support_torch_compile(dynamic_arg_dims=rows)
    segment_class: type[Segment] = compiled(type(name, (Segment,), {"forward": forward}))
    return segment_class


def last_kv_class(depth: int) -> type[LastKV]:
    """A compiled `LastKV` for a model of `depth` layers; see `segment_class`."""

    def forward(
        self: LastKV, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.projection(hidden_states, residual, positions)

    name = f"LastKV_of_{depth}"
    forward.__qualname__ = f"{name}.forward"
    compiled = support_torch_compile(
        dynamic_arg_dims={"positions": ROWS, "hidden_states": ROWS, "residual": ROWS}
    )
    last_kv_class: type[LastKV] = compiled(type(name, (LastKV,), {"forward": forward}))
    return last_kv_class


def build_stack(
    decoder: type[Decoder],
    body: nn.Module,
    head_size: int,
    cuts: Sequence[int],
    vllm_config: VllmConfig,
) -> Stack:
    """Cut the stack of `body` after each of `cuts` (counts of layers run, 0 for the embedding).

    The last layer becomes a segment of its own, unless it shares another's keys and values. If a
    cut follows it, the last segment is the final norm alone. `head_size` is the width of the LM
    head's input.
    """
    layers, own_kv_layers = decoder.layers(body), decoder.own_kv_layers(body)
    depth = len(layers)
    config = segment_config(vllm_config)
    cuts = sorted({*cuts, max(depth - 1, *cuts)} if own_kv_layers is None else set(cuts))
    spans = [*itertools.pairwise([0, *cuts]), (cuts[-1], depth)]
    segments = []
    for index, (first, last) in enumerate(spans):
        is_last = index == len(spans) - 1
        cls = segment_class(first, last, depth, embeds=index == 0, finishes=is_last)
        with compile_cache_folder(cls.__name__), set_current_vllm_config(config):
            segment = cls(vllm_config=config, decoder=decoder, body=body, layers=layers[first:last])
        segments.append(segment)
    last_kv = None
    if cuts[-1] < depth and own_kv_layers is None:
        projection, kv_class = decoder.kv_projection(layers[-1]), last_kv_class(depth)
        with compile_cache_folder(kv_class.__name__), set_current_vllm_config(config):
            last_kv = kv_class(vllm_config=config, projection=projection)
    captured_rows = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    shape = StackShape([last - first for first, last in spans], head_size, own_kv_layers)
    return Stack(tuple(segments), last_kv, shape, FixedStates(captured_rows))
