"""The first layers of a model alone, fine-tuned on its own answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.lessons import logits_after, train
from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.offline.calibration.data.examples import Example

EPOCHS = 3
PROMPTS = 32  # that it answers at once


class CutModel:
    """A model without its last layers."""

    def __init__(self, model: str, layers: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._causal.model.layers = self._causal.model.layers[:layers]
        self._causal.config.num_hidden_layers = layers

    def fit(self, examples: Sequence[Example], answers: Ints) -> None:
        """Learn the whole model's `answers` [examples], token ids."""
        prompts = [example.token_ids for example in examples]
        train(self._causal, list(zip(prompts, answers.tolist(), strict=True)), EPOCHS)

    @torch.inference_mode()
    def answer(
        self, examples: Sequence[Example], labels: Sequence[Sequence[int]]
    ) -> tuple[Ints, Floats]:
        """The best of each prompt's `labels`, and its probability among them."""
        answers = np.empty(len(examples), dtype=np.int64)
        sure = np.empty(len(examples))
        order = sorted(range(len(examples)), key=lambda place: len(examples[place].token_ids))
        for start in range(0, len(order), PROMPTS):
            places = order[start : start + PROMPTS]
            logits = logits_after(self._causal, [examples[place].token_ids for place in places])
            for place, row in zip(places, logits, strict=True):
                own = labels[place]
                best, column = row[list(own)].softmax(0).max(0)
                answers[place], sure[place] = own[int(column)], float(best)
        return answers, sure

    def save(self, directory: Path) -> None:
        """Write it in bfloat16."""
        self._causal.to(torch.bfloat16).save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)
