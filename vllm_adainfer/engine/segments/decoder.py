"""What the engine knows of a family of models: where vLLM's modules are, how to call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adainfer_kernels import Norm
from torch import Tensor, nn
from typing_extensions import override
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm

Layer = Callable[..., Any]  # one of vLLM's decoder layers, or that with some arguments


@dataclass(frozen=True)
class KVProjection:
    """How a layer makes keys and values from its input.

    Attributes:
        attention: vLLM's attention layer, which has the KV cache.
        qkv_proj: from the normed input to queries (and their gate), keys and values, in this order.
        norm: of the input; None if the input is projected without one.
        rotary: rotates keys by their positions; None if the embedding adds positions.
        value_norm: of each value; None for none.
        key_norm: before the rotation, of each key or of all keys of a row as one, as its size
            tells; None for none.

    """

    attention: Any
    qkv_proj: Any
    norm: nn.Module | None = None
    rotary: nn.Module | None = None
    key_norm: nn.Module | None = None
    value_norm: nn.Module | None = None

    @property
    def heads(self) -> tuple[int, int]:
        """Number of KV heads, and their size."""
        return self.attention.num_kv_heads, self.attention.head_size

    @property
    def q_size(self) -> int:
        """Number of the projection's outputs before keys and values: queries, or a gate, too."""
        heads, head_size = self.heads
        size: int = self.qkv_proj.output_size_per_partition - 2 * heads * head_size
        return size

    @property
    def keys_per_norm(self) -> int:
        """How many of a row's keys `key_norm` takes as one."""
        norm: Any = self.key_norm
        size: int = norm.weight.shape[0]
        return size // int(self.attention.head_size)

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, each [rows, heads, head size], of rows at int64 [rows] `positions`.

        `hidden` and `residual` are the parts of the stream, which the norm may overwrite.
        """
        state = hidden
        if self.norm is not None and residual is not None:
            state, _ = self.norm(state, residual)
        elif self.norm is not None:
            state = self.norm(state)
        both = self.qkv_proj(state)[0][:, self.q_size :]
        keys, values = both.unflatten(1, (2, *self.heads)).unbind(1)
        if self.key_norm is not None:
            size = self.keys_per_norm * self.attention.head_size
            parts = keys.flatten(1).unflatten(1, (-1, size))
            keys = self.key_norm(parts).view_as(keys)
        if self.value_norm is not None:
            values = self.value_norm(values.contiguous())
        if self.rotary is not None:
            # A copy: vLLM's op writes to its argument, which is a part of the projection's output.
            # Compiling that, torch 2.13 may take the number of rows for a constant.
            rotated = self.rotary(positions, keys.flatten(1).clone(), None)[0]
            keys = rotated.unflatten(1, self.heads)
        return keys, values


class Decoder:
    """The conventions of vLLM's Llama; another family overrides what it does differently.

    `body` is the module that holds embedding, layers and final norm. The functions keep no state:
    they are called with vLLM's modules, also inside compiled code.
    """

    @staticmethod
    def body(model: Any) -> Any:
        """The body of a vLLM model for causal LM."""
        return model.model

    @staticmethod
    def head(model: Any) -> Any:
        """Its LM head."""
        return model.lm_head

    @staticmethod
    def embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
        """Input of the first layer, [rows, hidden size], for int [rows] token `ids`."""
        embedded: Tensor = body.embed_input_ids(ids)
        return embedded

    @staticmethod
    def per_layer_inputs(body: Any, ids: Tensor, embedded: Tensor) -> Tensor | None:
        """[rows, layers, size], an input of its own for each layer; None for none."""
        return None

    @staticmethod
    def given(layer: nn.Module, own: Tensor) -> Layer:
        """`layer` with its part of `per_layer_inputs`, [rows, size]."""
        raise AssertionError("layers of this family have no inputs of their own")

    @staticmethod
    def own_kv_layers(body: Any) -> int | None:
        """How many layers write keys and values, if later ones read those of others."""
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
        """The parts of the stream after one layer."""
        after: tuple[Tensor, Tensor | None] = layer(positions, hidden, residual)
        return after

    @staticmethod
    def finish(body: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The LM head's input, [rows, head size], from the stream after the last layer."""
        normed: Tensor = body.norm(hidden, residual)[0]
        return normed

    @staticmethod
    def final_norm(body: Any) -> nn.Module | None:
        """The norm in `finish`."""
        norm: nn.Module = body.norm
        return norm

    @staticmethod
    def projection(body: Any) -> Tensor | None:
        """[hidden size, head size], the projection after that norm; None for none."""
        return None

    @staticmethod
    def kv_projection(layer: Any) -> KVProjection:
        """How `layer` makes keys and values, with rotation and key norm if it has them."""
        attention = layer.self_attn
        return KVProjection(
            attention=attention.attn,
            qkv_proj=attention.qkv_proj,
            norm=layer.input_layernorm,
            rotary=getattr(attention, "rotary_emb", None),
            key_norm=getattr(attention, "k_norm", None),
        )


class OnePartDecoder(Decoder):
    """The residual stream is in one part: layers add to it themselves."""

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
    """The parameters of one of vLLM's norms, as loaded so far."""
    if isinstance(module, GemmaRMSNorm):  # its weight is stored less one
        return Norm("rms", module.weight.data.float() + 1, eps=module.variance_epsilon)
    if isinstance(module, RMSNorm):
        return Norm("rms", module.weight.data, eps=module.variance_epsilon)
    assert isinstance(module, LayerNorm), f"no supported family has such a norm: {module}"
    weight = None if module.weight is None else module.weight.data
    return Norm("layer", weight, None if module.bias is None else module.bias.data, module.eps)
