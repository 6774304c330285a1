"""A classifier made of a causal model: the rows of its LM head for some labels become its head.

It answers as the model does for these labels, so a policy for one can be compared with a policy for
the other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vllm_adainfer.offline.calibration.data.examples import first_token

WEIGHTS = "model.safetensors"


def label_classifier(model: Path, directory: Path, labels: Sequence[str], prompt: str) -> Path:
    """Write the classifier of `labels` to `directory`, which is made anew.

    `model` is the directory of a causal model with tied weights in one file; the labels come after
    `prompt`, as after any other one.
    """
    shutil.copytree(model, directory)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [first_token(prompt, label, tokenizer) for label in labels]
    weights = load_file(directory / WEIGHTS)
    head = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"])
    weights["score.weight"] = head[torch.tensor(rows)].contiguous()
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (architecture,) = config["architectures"]
    config |= {
        "architectures": [architecture.replace("ForCausalLM", "ForSequenceClassification")],
        "id2label": {str(column): label for column, label in enumerate(labels)},
        "label2id": {label: column for column, label in enumerate(labels)},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory
