"""KV fill: keys and values of skipped layers, made from the state at the exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from adainfer_kernels import Norm
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm
from typing_extensions import override

from vllm_adainfer.engine.compat.attention import write_kv
from vllm_adainfer.engine.segments.decoder import KVProjection, norm_of


class KVFill(Protocol):
    """Writes the keys and values of several layers from one hidden state, for `PropagateKV`."""

    def __call__(
        self, exit_index: int, states: Tensor, positions: Tensor, slots: dict[str, Tensor]
    ) -> None:
        """Write keys and values of all layers after an exit point.

        Args:
            exit_index: the index of the exit point.
            states: [rows, hidden size], the residual stream there.
            positions: int64 [rows], each row's position in its sequence.
            slots: int64 [rows] by layer name, the cache slots.

        """


def kv_fill_of(layers: Sequence[KVProjection], exit_points: Sequence[int]) -> KVFill:
    """The KV fill for `layers`, all layers of a model that write keys and values.

    Call it after the weights are loaded and before vLLM repacks them, which drops the originals.
    """
    alike = len({layer.heads for layer in layers}) == 1
    if alike and all(layer.value_norm is None for layer in layers):
        return StackedProjection(layers, exit_points)
    return LayerByLayer(layers, exit_points)


class LayerByLayer(KVFill):
    """Each layer projects the state itself, for layers that differ in more than their weights."""

    def __init__(self, layers: Sequence[KVProjection], exit_points: Sequence[int]) -> None:
        """See `kv_fill_of`."""
        self._below = [layers[point:] for point in exit_points]

    @override
    def __call__(
        self, exit_index: int, states: Tensor, positions: Tensor, slots: dict[str, Tensor]
    ) -> None:
        for layer in self._below[exit_index]:
            keys, values = layer(states, None, positions)
            write_kv(layer.attention, keys, values, slots[layer.attention.layer_name])


class StackedProjection(KVFill):
    """One matrix product for the projections of all layers.

    It keeps a copy of the weights, with the weight and bias of each layer's norm folded in.
    """

    def __init__(self, layers: Sequence[KVProjection], exit_points: Sequence[int]) -> None:
        """See `kv_fill_of`."""
        self._layers = layers[exit_points[0] :]
        self._skip = [layer - exit_points[0] for layer in exit_points]
        first = self._layers[0]
        self._norm = None if first.norm is None else norm_of(first.norm)
        weights, biases = zip(*map(_folded, self._layers), strict=True)
        self._weight = torch.stack(weights)  # [layers, 2 (K, V) x heads x head size, hidden size]
        self._bias = torch.stack(biases)
        self._key_norm = None if first.key_norm is None else norm_of(first.key_norm)
        if self._key_norm is not None:  # [layers, 1, size]
            norms = [norm_of(layer.key_norm) for layer in self._layers if layer.key_norm]
            scales = [norm.weight for norm in norms if norm.weight is not None]
            self._key_weight = torch.stack(scales).unsqueeze(1)

    @override
    def __call__(
        self, exit_index: int, states: Tensor, positions: Tensor, slots: dict[str, Tensor]
    ) -> None:
        skip, rows = self._skip[exit_index], states.shape[0]
        layers = self._layers[skip:]
        normed = _normed(states, self._norm)
        both = linear(normed, self._weight[skip:].flatten(0, 1), self._bias[skip:].flatten())
        keys, values = both.view(rows, len(layers), 2, *layers[0].heads).unbind(dim=2)
        if self._key_norm is not None:
            parts = keys.unflatten(2, (-1, layers[0].keys_per_norm)).flatten(3)
            parts = _normed(parts, self._key_norm) * self._key_weight[skip:]
            keys = parts.to(states.dtype).view_as(keys)
        keys = _rotated(keys, layers, positions)
        for index, layer in enumerate(layers):
            attention = layer.attention
            write_kv(attention, keys[:, index], values[:, index], slots[attention.layer_name])


def _folded(layer: KVProjection) -> tuple[Tensor, Tensor]:
    """K/V weight [2 x heads x head size, hidden size] and bias, with the norm folded in."""
    weight = layer.qkv_proj.weight.data[layer.q_size :]
    qkv_bias = layer.qkv_proj.bias
    bias = weight.new_zeros(len(weight)) if qkv_bias is None else qkv_bias.data[layer.q_size :]
    if layer.norm is None:
        return weight, bias
    norm, dtype = norm_of(layer.norm), weight.dtype
    if norm.bias is not None:
        bias = (bias.float() + weight.float() @ norm.bias.float()).to(dtype)
    if norm.weight is not None:
        weight = (weight.float() * norm.weight.float()).to(dtype)
    return weight, bias


def _normed(states: Tensor, norm: Norm | None) -> Tensor:
    """Normalise `states` over the last dimension, without the norm's weight and bias."""
    if norm is None:
        return states
    size = states.shape[-1:]
    if norm.kind == "rms":
        return rms_norm(states.float(), size, eps=norm.eps).to(states.dtype)
    return layer_norm(states.float(), size, eps=norm.eps).to(states.dtype)


def _rotated(keys: Tensor, layers: Sequence[KVProjection], positions: Tensor) -> Tensor:
    """Rotate `keys` [rows, layers, heads, head size] as each layer does."""
    rotaries = [layer.rotary for layer in layers]
    if len(set(rotaries)) == 1:  # all at once
        [rotary] = set(rotaries)
        if rotary is None:
            return keys
        rotated: Tensor = rotary(positions, keys.flatten(1), None)[0].view_as(keys)
        return rotated
    by_layer = [
        key if rotary is None else rotary(positions, key.flatten(1), None)[0].view_as(key)
        for key, rotary in zip(keys.unbind(1), rotaries, strict=True)
    ]
    return torch.stack(by_layer, dim=1)
