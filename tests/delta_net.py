"""Gated delta-net layers in fp32 on a CPU, where vLLM 0.32 has them in bfloat16 only.

A slow, obvious stand-in for its kernel, which keeps each request's state where the kernel does. So
the oracle can be fp32 for these families, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu, softplus
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType

KERNEL = gdn_attention.cpu_gdn_attention_core


def core(
    mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType
) -> None:
    """In place of `cpu_gdn_attention_core`, whose arguments it has."""
    if mixed_qkv.dtype == torch.bfloat16:
        KERNEL(mixed_qkv, b, a, core_attn_out, layer_name)
        return
    context = get_forward_context()
    layer: Any = context.no_compile_layers[gdn_attention._resolve_layer_name(layer_name)]
    metadata = (context.attn_metadata or {}).get(layer.prefix)
    if metadata is None:  # on GPUs, too, that is a profiling pass
        return
    starts = metadata.non_spec_query_start_loc.tolist()
    for place in range(metadata.num_decodes + metadata.num_prefills):
        rows = slice(starts[place], starts[place + 1])
        slot = metadata.non_spec_state_indices_tensor[place]
        window, state = layer.kv_cache[0][slot], layer.kv_cache[1][slot]
        if place >= metadata.num_decodes and not metadata.has_initial_state[place]:
            window.zero_()
            state.zero_()
        core_attn_out[rows] = sequence(layer, mixed_qkv[rows], b[rows], a[rows], window, state)


def sequence(
    layer: Any, mixed_qkv: Tensor, b: Tensor, a: Tensor, window: Tensor, state: Tensor
) -> Tensor:
    """Rows of one request, in order, [rows, heads, size].

    `window` [3, channels] and `state` [heads, size, size] hold what came before, and are updated.
    """
    inputs = torch.cat([window, mixed_qkv])
    window.copy_(inputs[-len(window) :])
    weight = layer.conv1d.weight.squeeze(1)  # [channels, 4]
    mixed = silu(torch.einsum("rcw,cw->rc", inputs.unfold(0, weight.shape[1], 1), weight))
    query, key, value = layer.rearrange_mixed_qkv(mixed)
    repeats = value.shape[-2] // key.shape[-2]
    query, key = (
        normalize(part.squeeze(0), dim=-1).repeat_interleave(repeats, dim=-2)
        for part in (query, key)
    )
    query = query * layer.head_k_dim**-0.5
    decay = (-layer.A_log.exp() * softplus(a + layer.dt_bias)).exp()
    outputs = []
    for q, k, v, forget, beta in zip(query, key, value.squeeze(0), decay, b.sigmoid(), strict=True):
        state *= forget[:, None, None]
        change = (v - torch.einsum("hk,hkv->hv", k, state)) * beta[:, None]
        state += torch.einsum("hk,hv->hkv", k, change)
        outputs.append(torch.einsum("hk,hkv->hv", q, state))
    return torch.stack(outputs)


def allow_fp32() -> None:
    """Put the stand-in where the first engine of the process registers the kernel."""
    gdn_attention.cpu_gdn_attention_core = core
