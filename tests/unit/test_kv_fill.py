"""K and V of skipped layers, by the formula: norm, projection and rotation of one state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_adainfer import compat
from vllm_adainfer.models.kv_fill import KVFill

HIDDEN, Q_SIZE, HEADS, HEAD_DIM, LAYERS, EPS = 12, 8, 2, 4, 5, 1e-5
KV_SIZE = HEADS * HEAD_DIM


def rotate(positions: Tensor, keys: Tensor, _: None) -> tuple[Tensor, None]:
    """Stands for RoPE: another thing for each position and place in a head."""
    heads = keys.view(len(positions), -1, HEAD_DIM)
    turned = heads * (1 + positions.view(-1, 1, 1)) + torch.arange(HEAD_DIM)
    return turned.view_as(keys), None


def layer_of(number: int, bias: bool) -> Any:
    generator = torch.Generator().manual_seed(number)
    rows = Q_SIZE + 2 * KV_SIZE
    return SimpleNamespace(
        input_layernorm=SimpleNamespace(
            weight=SimpleNamespace(data=torch.rand(HIDDEN, generator=generator)),
            variance_epsilon=EPS,
        ),
        self_attn=SimpleNamespace(
            q_size=Q_SIZE,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            rotary_emb=rotate,
            attn=SimpleNamespace(layer_name=f"layer {number}"),
            qkv_proj=SimpleNamespace(
                weight=SimpleNamespace(data=torch.randn(rows, HIDDEN, generator=generator)),
                bias=SimpleNamespace(data=torch.randn(rows, generator=generator)) if bias else None,
            ),
        ),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("exit_index", [0, 1])
def test_every_layer_after_the_exit_point_is_filled(monkeypatch, bias, exit_index):
    written: dict[str, tuple[Tensor, ...]] = {}
    monkeypatch.setattr(
        compat, "write_kv", lambda attn, *what: written.update({attn.layer_name: what})
    )
    layers = [layer_of(number, bias) for number in range(LAYERS)]
    exit_points = (2, 4)
    states = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(9))
    positions = torch.tensor([5, 0, 7])
    slots = {f"layer {number}": torch.tensor([number, 1, 2]) for number in range(LAYERS)}
    KVFill(layers, exit_points)(exit_index, states, positions, slots)

    filled = range(exit_points[exit_index], LAYERS)
    assert list(written) == [f"layer {number}" for number in filled]
    normed = states / (states.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    for number in filled:
        layer = layers[number]
        projection = layer.self_attn.qkv_proj
        both = (normed * layer.input_layernorm.weight.data) @ projection.weight.data[Q_SIZE:].T
        both += projection.bias.data[Q_SIZE:] if bias else 0
        keys, values = both.split(KV_SIZE, dim=1)
        found_keys, found_values, found_slots = written[f"layer {number}"]
        torch.testing.assert_close(found_keys.flatten(1), rotate(positions, keys, None)[0])
        torch.testing.assert_close(found_values.flatten(1), values)
        assert found_slots is slots[f"layer {number}"]
