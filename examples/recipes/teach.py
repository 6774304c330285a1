"""Teach a small model the answers of the recipes: a stand-in for a model that knows your task.

python examples/recipes/teach.py .recipes/base .recipes/model .recipes/*/lessons.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

LEARNING_RATE = 1e-4
LESSONS = 16  # of a step


def main(base: Path, output: Path, *lessons: Path) -> None:
    """Train on the lines {"prompt": ..., "answer": ...} once, and write the model in bfloat16."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    lines = [json.loads(line) for path in lessons for line in path.read_text().splitlines()]
    random.Random(0).shuffle(lines)
    steps = [lines[start : start + LESSONS] for start in range(0, len(lines), LESSONS)]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=len(steps), pct_start=0.1
    )
    # A processor without instructions for bfloat16 emulates it, many times as slowly as fp32.
    in_bfloat16 = any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    for step in tqdm(steps, unit="step"):
        pairs = [(tokenizer.encode(one["prompt"]), tokenizer.encode(one["answer"])) for one in step]
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad([torch.tensor(prompt + answer) for prompt, answer in pairs], batch_first=True)
        # Only answers count; padding stands behind them, so that no token attends to it.
        targets = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in pairs]
        labels = pad(targets, batch_first=True, padding_value=-100)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
