"""A family of models as the exit loop sees it: where vLLM's modules are, and how to call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm

from vllm_adainfer.policy.norm import Norm


@dataclass(frozen=True)
class KVProjection:
    """How a layer makes keys and values of its input.

    Attributes:
        attention: vLLM's attention layer, whose cache they are for.
        qkv_proj: from the normed input to queries, keys and values, in this order.
        norm: of the input; None where it is projected as it is.
        rotary: turns keys by their positions; None where positions are in the input.
        key_norm: of each key, over the head size, before it is turned; None for none.

    """

    attention: Any
    qkv_proj: Any
    norm: nn.Module | None = None
    rotary: nn.Module | None = None
    key_norm: nn.Module | None = None

    @property
    def heads(self) -> tuple[int, int]:
        """Number of KV heads, and their size."""
        return self.attention.num_kv_heads, self.attention.head_size

    @property
    def q_size(self) -> int:
        """Outputs of the projection that are queries."""
        size: int = self.attention.num_heads * self.attention.head_size
        return size

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, each [rows, heads, head size], of rows at int64 [rows] `positions`.

        `hidden` and `residual` are the stream's parts, which the norm may overwrite.
        """
        state = hidden
        if self.norm is not None and residual is not None:
            state, _ = self.norm(state, residual)
        elif self.norm is not None:
            state = self.norm(state)
        both = self.qkv_proj(state)[0][:, self.q_size :]
        keys, values = both.unflatten(1, (2, *self.heads)).unbind(1)
        if self.key_norm is not None:
            keys = self.key_norm(keys.contiguous())
        if self.rotary is not None:
            # A copy: vLLM's own op writes to what it is given, a part of the projection's output.
            # Compiled so, torch 2.13 may take the number of rows for a constant.
            turned = self.rotary(positions, keys.flatten(1).clone(), None)[0]
            keys = turned.unflatten(1, self.heads)
        return keys, values


class Decoder:
    """The conventions of vLLM's Llama; another family overrides what it does differently.

    `body` is the module that holds embedding, layers and final norm. Nothing is kept here: the
    functions are called with vLLM's modules, inside of compiled code, too.
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
        """What the first layer gets, [rows, hidden size], for int [rows] token `ids`."""
        embedded: Tensor = body.embed_input_ids(ids)
        return embedded

    @staticmethod
    def layers(body: Any) -> Sequence[nn.Module]:
        """The decoder layers."""
        layers: Sequence[nn.Module] = body.layers
        return layers

    @staticmethod
    def run_layer(
        layer: nn.Module, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One layer: the parts of the stream after it."""
        after: tuple[Tensor, Tensor | None] = layer(positions, hidden, residual)
        return after

    @staticmethod
    def finish(body: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """What the LM head reads, [rows, head size], of the stream after the last layer."""
        normed: Tensor = body.norm(hidden, residual)[0]
        return normed

    @staticmethod
    def final_norm(body: Any) -> nn.Module | None:
        """The norm in `finish`."""
        norm: nn.Module = body.norm
        return norm

    @staticmethod
    def projection(body: Any) -> Tensor | None:
        """[hidden size, head size], what follows it there, if anything does."""
        return None

    @staticmethod
    def kv_projection(layer: Any) -> KVProjection:
        """How `layer` makes keys and values; rotation and norm of keys where it has them."""
        attention = layer.self_attn
        return KVProjection(
            attention=attention.attn,
            qkv_proj=attention.qkv_proj,
            norm=layer.input_layernorm,
            rotary=getattr(attention, "rotary_emb", None),
            key_norm=getattr(attention, "k_norm", None),
        )


def norm_of(module: nn.Module) -> Norm:
    """The numbers of one of vLLM's norms, as they are loaded now."""
    if isinstance(module, GemmaRMSNorm):  # stores what is added to one
        return Norm("rms", module.weight.data.float() + 1, eps=module.variance_epsilon)
    if isinstance(module, RMSNorm):
        return Norm("rms", module.weight.data, eps=module.variance_epsilon)
    assert isinstance(module, LayerNorm), f"a norm that no supported family has: {module}"
    weight = None if module.weight is None else module.weight.data
    return Norm("layer", weight, None if module.bias is None else module.bias.data, module.eps)
