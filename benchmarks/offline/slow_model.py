"""A model with more layers and the same answers: idle layers stand between its own."""

from __future__ import annotations

import copy
from pathlib import Path


def with_idle_layers(model: Path, output: Path, times: int) -> Path:
    """Write `model`, a Llama, with `times` - 1 idle layers after each of its layers.

    An idle layer computes all that another does, but its last projections are zero, so it adds
    nothing to the residual stream.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    layers = []
    for layer in loaded.model.layers:
        idle = copy.deepcopy(layer)
        idle.self_attn.o_proj.weight.data.zero_()
        idle.mlp.down_proj.weight.data.zero_()
        layers += [layer, *(copy.deepcopy(idle) for _ in range(times - 1))]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    loaded.model.layers = type(loaded.model.layers)(layers)
    loaded.config.num_hidden_layers = len(layers)
    loaded.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    return output
