"""Keys and values of the layers that an exited row skips, made of the state it left with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.model_executor.models.llama import LlamaDecoderLayer

from vllm_adainfer import compat


class KVFill:
    """What `PropagateKV` calls: per layer norm, K/V projection and RoPE of one and the same state.

    All layers' projections are one product, whose weights are kept a second time for it, each
    with the layer's norm weight multiplied in.
    """

    def __init__(self, layers: Sequence[LlamaDecoderLayer], exit_points: Sequence[int]) -> None:
        """`layers` are the model's, with weights loaded and not repacked yet.

        vLLM repacks linear weights for CPUs after loading, and drops the originals.
        """
        filled = layers[exit_points[0] :]
        self._skip = [layer - exit_points[0] for layer in exit_points]
        self._attention = [layer.self_attn.attn for layer in filled]
        self._eps = filled[0].input_layernorm.variance_epsilon
        first = filled[0].self_attn
        self._rotary = first.rotary_emb
        self._heads = first.num_kv_heads, first.head_dim
        # [layers, 2 (K, V) x heads x head size, hidden size]
        self._weight = torch.stack([_kv_weight(layer) for layer in filled])
        self._bias = None
        if first.qkv_proj.bias is not None:
            self._bias = torch.stack(
                [layer.self_attn.qkv_proj.bias.data[first.q_size :] for layer in filled]
            )

    def __call__(
        self, exit_index: int, states: Tensor, positions: Tensor, slots: dict[str, Tensor]
    ) -> None:
        """Write keys and values of all layers after an exit point.

        Args:
            exit_index: which exit point.
            states: [rows, hidden size], the residual stream there.
            positions: int64 [rows], of the rows in their sequences.
            slots: int64 [rows] by layer name, where in the cache they belong.

        """
        skip, rows = self._skip[exit_index], states.shape[0]
        weight = self._weight[skip:]
        bias = None if self._bias is None else self._bias[skip:].flatten()
        normed = torch.nn.functional.rms_norm(states.float(), states.shape[1:], eps=self._eps)
        both = torch.nn.functional.linear(normed.to(states.dtype), weight.flatten(0, 1), bias)
        keys, values = both.view(rows, weight.shape[0], 2, -1).unbind(dim=2)
        keys, _ = self._rotary(positions, keys.flatten(1), None)
        for layer, attention in enumerate(self._attention[skip:]):
            compat.write_kv(
                attention,
                keys.view(rows, weight.shape[0], *self._heads)[:, layer],
                values[:, layer].view(rows, *self._heads),
                slots[attention.layer_name],
            )


def _kv_weight(layer: LlamaDecoderLayer) -> Tensor:
    """[2 x heads x head size, hidden size], the layer's norm weight multiplied in."""
    weight = layer.self_attn.qkv_proj.weight.data[layer.self_attn.q_size :]
    return (weight.float() * layer.input_layernorm.weight.data.float()).to(weight.dtype)
