"""Tiny classifiers, which vLLM runs as pooling models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

COLUMNS = {"softmax": 3, "sigmoid": 1, "sigmoids": 3}


def classifier(base: Path, directory: Path, columns: int) -> Path:
    """The tiny Llama with a random score head in place of its LM head.

    In a directory named "sigmoids" any number of its labels may hold.
    """
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    weights["score.weight"] = torch.randn(columns, 64, generator=torch.Generator().manual_seed(3))
    directory.mkdir()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    for file in base.glob("*.json"):
        (directory / file.name).write_text(file.read_text())
    config = json.loads((base / "config.json").read_text())
    names = {str(column): f"c{column}" for column in range(columns)}
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": names,
        "label2id": {name: int(column) for column, name in names.items()},
    }
    if directory.name == "sigmoids":
        config["problem_type"] = "multi_label_classification"
    (directory / "config.json").write_text(json.dumps(config))
    return directory
