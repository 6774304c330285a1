"""Decoder: where a model family keeps vLLM's modules, and how to call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adainfer_kernels import Norm
from torch import Tensor, nn
from typing_extensions import override
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm

Layer = Callable[..., Any]  # one of vLLM's decoder layers, perhaps with arguments bound


@dataclass(frozen=True)
class KVProjection:
    """How a layer computes keys and values from its input.

    Attributes:
        attention: vLLM's attention layer, which owns the KV cache.
        qkv_proj: projects the normed input to queries (and their gate), keys and values, in order.
        norm: the norm of the input; None if there is none.
        rotary: rotates keys by position; None if the embedding adds positions.
        key_norm: the norm of keys before rotation, of each key or of all keys of a row together,
            depending on its size; None if there is none.
        value_norm: the norm of each value; None if there is none.

    """

    attention: Any
    qkv_proj: Any
    norm: nn.Module | None = None
    rotary: nn.Module | None = None
    key_norm: nn.Module | None = None
    value_norm: nn.Module | None = None

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, each [rows, heads, head size], at `positions`, int64 [rows].

        `hidden` and `residual` are the parts of the residual stream. The norm may overwrite them.
        """
        state = hidden
        if self.norm is not None and residual is not None:
            state, _ = self.norm(state, residual)
        elif self.norm is not None:
            state = self.norm(state)
        heads = self.attention.num_kv_heads, self.attention.head_size
        # Before keys and values come queries, perhaps with a gate.
        both = self.qkv_proj(state)[0][:, -2 * heads[0] * heads[1] :]
        keys, values = both.unflatten(1, (2, *heads)).unbind(1)
        if self.key_norm is not None:
            norm: Any = self.key_norm
            parts = keys.flatten(1).unflatten(1, (-1, norm.weight.shape[0]))
            keys = self.key_norm(parts).view_as(keys)
        if self.value_norm is not None:
            values = self.value_norm(values.contiguous())
        if self.rotary is not None:
            # A copy: vLLM's op writes to its argument, here a view of the projection's output.
            # When that is compiled, torch 2.13 may specialise on the number of rows.
            rotated = self.rotary(positions, keys.flatten(1).clone(), None)[0]
            keys = rotated.unflatten(1, heads)
        return keys, values


class Decoder:
    """The conventions of vLLM's Llama. Another family overrides what it does differently.

    `body` is the module that holds the embedding, the layers and the final norm. The functions are
    stateless, and also run inside compiled code.
    """

    @staticmethod
    def body(model: Any) -> Any:
        """The body of a vLLM causal LM."""
        return model.model

    @staticmethod
    def head(model: Any) -> Any:
        """The LM head of a vLLM causal LM."""
        return model.lm_head

    @staticmethod
    def embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
        """The input of the first layer, [rows, hidden size], for token `ids`, int [rows]."""
        embedded: Tensor = body.embed_input_ids(ids)
        return embedded

    @staticmethod
    def per_layer_inputs(body: Any, ids: Tensor, embedded: Tensor) -> Tensor | None:
        """[rows, layers, size], a separate input for each layer; None if layers have none."""
        return None

    @staticmethod
    def given(layer: nn.Module, own: Tensor) -> Layer:
        """`layer` with its part of `per_layer_inputs`, [rows, size], bound."""
        raise AssertionError("layers of this family have no per-layer inputs")

    @staticmethod
    def own_kv_layers(body: Any) -> int | None:
        """How many layers write keys and values, if later layers share them; else None."""
        return None

    @staticmethod
    def layers(body: Any) -> Sequence[nn.Module]:
        """The decoder layers."""
        layers: Sequence[nn.Module] = body.layers
        return layers

    @staticmethod
    def run_layer(
        layer: Layer, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The parts of the residual stream after one layer."""
        after: tuple[Tensor, Tensor | None] = layer(positions, hidden, residual)
        return after

    @staticmethod
    def finish(body: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The LM head's input, [rows, head size], from the stream after the last layer."""
        normed: Tensor = body.norm(hidden, residual)[0]
        return normed

    @staticmethod
    def final_norm(body: Any) -> nn.Module | None:
        """The norm that `finish` applies; None if there is none."""
        norm: nn.Module = body.norm
        return norm

    @staticmethod
    def projection(body: Any) -> Tensor | None:
        """[hidden size, head size], the projection after that norm; None if there is none."""
        return None

    @staticmethod
    def kv_projection(layer: Any) -> KVProjection:
        """How `layer` computes keys and values."""
        attention = layer.self_attn
        return KVProjection(
            attention=attention.attn,
            qkv_proj=attention.qkv_proj,
            norm=layer.input_layernorm,
            rotary=getattr(attention, "rotary_emb", None),
            key_norm=getattr(attention, "k_norm", None),
        )


class OnePartDecoder(Decoder):
    """A residual stream in one part: layers add to it themselves."""

    @staticmethod
    @override
    def run_layer(
        layer: Layer, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return layer(positions, hidden), None

    @staticmethod
    @override
    def finish(body: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
        normed: Tensor = body.norm(hidden)
        return normed


def norm_of(module: nn.Module) -> Norm:
    """The parameters of one of vLLM's norms."""
    if isinstance(module, GemmaRMSNorm):  # its weight is stored less one
        return Norm("rms", module.weight.data.float() + 1, eps=module.variance_epsilon)
    if isinstance(module, RMSNorm):
        return Norm("rms", module.weight.data, eps=module.variance_epsilon)
    assert isinstance(module, LayerNorm), f"no supported family has such a norm: {module}"
    weight = None if module.weight is None else module.weight.data
    return Norm("layer", weight, None if module.bias is None else module.bias.data, module.eps)
