"""Tiny quantised checkpoints, each as its format defines it, rounded to nearest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32  # input features that share a scale
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's gemm kernels want nibbles so

Quantised = tuple[
    dict[str, Tensor], Tensor
]  # tensors by suffix, and the weight that they stand for


def nibbles(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` [out, in] as int32 0 to 15 around 8, scales [out, in / `GROUP`], and dequantised."""
    grouped = weight.unflatten(1, (-1, GROUP))
    scale = (grouped.abs().amax(2, keepdim=True) / 7).bfloat16().float()
    values = (grouped / scale).round().clamp(-8, 7)
    return (values + 8).flatten(1).int(), scale.squeeze(2), (values * scale).flatten(1)


def packed(values: Tensor, dim: int, order: list[int] | None = None) -> Tensor:
    """Eight int32 nibbles along `dim` in one, the first (in `order`) in the lowest bits."""
    groups = values.movedim(dim, -1).unflatten(-1, (-1, 8))[..., order or list(range(8))]
    word = sum(groups[..., place].long() << 4 * place for place in range(8))
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int().movedim(-1, dim).contiguous()


def gptq(weight: Tensor) -> Quantised:
    values, scales, dequantised = nibbles(weight)
    zeros = torch.full((weight.shape[1] // GROUP, weight.shape[0]), 7, dtype=torch.int32)
    return {
        "qweight": packed(values.T, 0),
        "qzeros": packed(zeros, 1),  # stored less one
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }, dequantised


def awq(weight: Tensor) -> Quantised:
    values, scales, dequantised = nibbles(weight)
    zeros = torch.full((weight.shape[1] // GROUP, weight.shape[0]), 8, dtype=torch.int32)
    return {
        "qweight": packed(values.T, 1, AWQ_ORDER),
        "qzeros": packed(zeros, 1, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }, dequantised


def pack_quantized(weight: Tensor) -> Quantised:
    values, scales, dequantised = nibbles(weight)
    shape = torch.tensor(weight.shape)
    tensors = {"weight_packed": packed(values, 1), "weight_scale": scales, "weight_shape": shape}
    return tensors, dequantised


def int8(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values * scale


def fp8(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def channel(bits: int, kind: str) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "channel"}


def by_token(bits: int, kind: str) -> dict[str, Any]:
    return {**channel(bits, kind), "strategy": "token", "dynamic": True}


FOUR_BITS = {"bits": 4, "group_size": GROUP}
W4 = {**channel(4, "int"), "strategy": "group", "group_size": GROUP}
# What the checkpoint's config says, and how a weight is written.
SCHEMES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Quantised]]] = {
    "gptq": ({"quant_method": "gptq", "desc_act": False, "sym": True, **FOUR_BITS}, gptq),
    "awq": ({"quant_method": "awq", "zero_point": True, "version": "gemm", **FOUR_BITS}, awq),
    "compressed-tensors w4a16": (compressed("pack-quantized", W4, None), pack_quantized),
    "compressed-tensors int8": (
        compressed("int-quantized", channel(8, "int"), by_token(8, "int")),
        int8,
    ),
    "compressed-tensors fp8": (
        compressed("float-quantized", channel(8, "float"), by_token(8, "float")),
        fp8,
    ),
}


def quantise(model: Path, scheme: str, head: bool, directory: Path) -> tuple[Path, Path]:
    """A checkpoint with `model`'s linear layers quantised (with `head` the LM head, too).

    Returns:
        where it is, and where a plain checkpoint of the weights that it stands for is.

    """
    config, write = SCHEMES[scheme]
    weights = load_file(model / "model.safetensors")
    quantised, plain = {}, {}
    for name, weight in weights.items():
        plain[name] = weight
        if weight.dim() == 2 and ("_proj" in name or (head and "lm_head" in name)):
            tensors, plain[name] = write(weight)
            quantised |= {name.replace("weight", suffix): t for suffix, t in tensors.items()}
        else:
            quantised[name] = weight
    hf_config = json.loads((model / "config.json").read_text())
    for kind, tensors in (("quantised", quantised), ("plain", plain)):
        (directory / kind).mkdir()
        for path in model.glob("*.json"):
            (directory / kind / path.name).write_text(path.read_text())
        save_file(tensors, directory / kind / "model.safetensors", metadata={"format": "pt"})
    hf_config["quantization_config"] = config | ({"lm_head": True} if head else {})
    (directory / "quantised" / "config.json").write_text(json.dumps(hf_config))
    return directory / "quantised", directory / "plain"
