"""K and V of skipped layers against the formula: norm, projection, key norm, rotation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm

from vllm_adainfer.engine.segments import kv_fill
from vllm_adainfer.engine.segments.decoder import KVProjection, norm_of
from vllm_adainfer.engine.segments.kv_fill import LayerByLayer, StackedProjection, kv_fill_of

HIDDEN, HEADS, HEAD_DIM, LAYERS, EPS = 12, 2, 4, 5, 1e-5
Q_SIZE, KV_SIZE = 3 * HEAD_DIM, HEADS * HEAD_DIM
NORMS = {"rms": RMSNorm, "gemma": GemmaRMSNorm, "layer": LayerNorm}


def rotation(faster: int) -> Any:
    """Stands in for RoPE: depends on the position and the place in a head."""

    def rotate(positions: Tensor, keys: Tensor, _: None) -> tuple[Tensor, None]:
        heads = keys.view(len(positions), -1, HEAD_DIM)
        turned = heads * (1 + faster * positions.view(-1, 1, 1)) + torch.arange(HEAD_DIM)
        return turned.view_as(keys), None

    return rotate


ROTATIONS = rotation(1), rotation(3)


def random_norm(kind: str, size: int) -> nn.Module:
    with set_current_vllm_config(VllmConfig()):
        norm = NORMS[kind](size, eps=EPS)
    for parameter in norm.parameters():
        parameter.data = torch.randn_like(parameter)
    return norm


def formula(state: Tensor, norm: nn.Module | None) -> Tensor:
    """The norm by its definition."""
    if norm is None:
        return state
    if isinstance(norm, LayerNorm):
        apart = state - state.mean(-1, keepdim=True)
        scaled = apart / (apart.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        return scaled * norm.weight.data + norm.bias.data
    scaled = state / (state.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return scaled * (norm.weight.data + isinstance(norm, GemmaRMSNorm))


class Projection(nn.Linear):
    """As vLLM's, which returns a bias, too."""

    @property
    def output_size_per_partition(self) -> int:
        return self.out_features

    def forward(self, state: Tensor) -> tuple[Tensor, None]:
        return super().forward(state), None


def layer_of(
    number: int,
    bias: bool,
    norm: str | None,
    key_norm: str | None,
    turns: int,
    keys_per_norm: int = 1,
    value_norm: str | None = None,
) -> Any:
    projection = Projection(HIDDEN, Q_SIZE + 2 * KV_SIZE, bias=bias).requires_grad_(False)
    return KVProjection(
        attention=SimpleNamespace(
            layer_name=f"layer {number}", num_heads=3, num_kv_heads=HEADS, head_size=HEAD_DIM
        ),
        qkv_proj=projection,
        norm=norm and random_norm(norm, HIDDEN),
        rotary=ROTATIONS[number % turns] if turns else None,
        key_norm=key_norm and random_norm(key_norm, keys_per_norm * HEAD_DIM),
        value_norm=value_norm and random_norm(value_norm, HEAD_DIM),
    )


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        pytest.param(StackedProjection, (False, "rms", None, 1), id="Llama"),
        pytest.param(StackedProjection, (True, "rms", None, 1), id="Qwen 2"),
        pytest.param(StackedProjection, (False, "rms", "rms", 1), id="Qwen 3"),
        pytest.param(StackedProjection, (False, "rms", "rms", 1, HEADS), id="OLMoE"),
        pytest.param(StackedProjection, (False, "gemma", "gemma", 2), id="Gemma 3"),
        pytest.param(LayerByLayer, (False, "rms", "rms", 2, 1, "rms"), id="Gemma 4"),
        pytest.param(StackedProjection, (True, "layer", None, 0), id="OPT"),
        pytest.param(StackedProjection, (True, None, None, 0), id="OPT-350m"),
    ],
)
@pytest.mark.parametrize("exit_index", [0, 1])
def test_every_layer_after_the_exit_point_is_filled(monkeypatch, kind, layer, exit_index):
    written: dict[str, tuple[Tensor, ...]] = {}
    monkeypatch.setattr(
        kv_fill, "write_kv", lambda attn, *what: written.update({attn.layer_name: what})
    )
    torch.manual_seed(0)
    layers = [layer_of(number, *layer) for number in range(LAYERS)]
    exit_points = (0, 4)
    states, positions = torch.randn(3, HIDDEN), torch.tensor([5, 0, 7])
    slots = {f"layer {number}": torch.tensor([number, 1, 2]) for number in range(LAYERS)}
    fill = kv_fill_of(layers, exit_points)
    assert isinstance(fill, kind)
    fill(exit_index, states, positions, slots)

    filled = range(exit_points[exit_index], LAYERS)
    assert list(written) == [f"layer {number}" for number in filled]
    for number in filled:
        layer = layers[number]
        both = layer.qkv_proj(formula(states, layer.norm))[0][:, Q_SIZE:]
        keys, values = both.view(3, 2, HEADS, HEAD_DIM).unbind(1)
        values = formula(values, layer.value_norm)
        size = HEAD_DIM if layer.key_norm is None else len(layer.key_norm.weight)
        keys = formula(keys.reshape(3, -1, size), layer.key_norm).view(3, HEADS, HEAD_DIM)
        if layer.rotary is not None:
            keys = layer.rotary(positions, keys.flatten(1), None)[0].view_as(keys)
        found_keys, found_values, found_slots = written[f"layer {number}"]
        torch.testing.assert_close(found_keys, keys)
        torch.testing.assert_close(found_values, values)
        assert found_slots is slots[f"layer {number}"]


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_known_by_its_numbers(kind):
    from adainfer_kernels import readout

    torch.manual_seed(0)
    module, states = random_norm(kind, HIDDEN), torch.randn(4, HIDDEN)
    found = readout(states, norm_of(module))
    torch.testing.assert_close(found, formula(states, module))
