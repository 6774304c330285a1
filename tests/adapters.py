"""LoRA adapters with random weights, as peft saves them, and models with one merged in."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ALPHA = 4, 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(
    model: Any, directory: Path, seed: int, modules: Sequence[str] = PROJECTIONS
) -> Path:
    """Write an adapter for some linear modules of a transformers model; the directory."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in modules:
            outputs, inputs = module.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = drawn(RANK, inputs)
            tensors[f"base_model.model.{name}.lora_B.weight"] = drawn(outputs, RANK)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(modules),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.inference_mode()
def merged(model: Any, directory: Path) -> Any:
    """A copy of a transformers model with an adapter of `save_adapter` in its weights."""
    model = copy.deepcopy(model)
    tensors = load_file(directory / "adapter_model.safetensors")
    for name, module in model.named_modules():
        down = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if down is not None:
            up = tensors[f"base_model.model.{name}.lora_B.weight"]
            module.weight += ALPHA / RANK * up @ down
    return model
