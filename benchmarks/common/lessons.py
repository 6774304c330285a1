"""Train a causal model to answer prompts, with one token by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from vllm_adainfer.offline.calibration.fit.net import mixed_precision

LEARNING_RATE = 1e-4
PROMPTS = 16  # of a step
T = TypeVar("T")
Lesson = tuple[Sequence[int], Any]  # tokens, and what `Loss` is to know of them
Loss = Callable[[Any, Sequence[Lesson]], torch.Tensor]  # of a causal model and a step's lessons


def loss_of_answers(causal: Any, step: Sequence[Lesson]) -> torch.Tensor:
    """The mean loss of right tokens: a lesson is a prompt's tokens and the one after them."""
    logits = logits_after(causal, [prompt for prompt, _ in step])
    right = torch.tensor([right for _, right in step])
    return torch.nn.functional.cross_entropy(logits, right)


def train(
    causal: Any, lessons: Sequence[Lesson], epochs: int = 1, loss: Loss = loss_of_answers
) -> None:
    """Change all weights of `causal` but its embeddings."""
    causal.get_input_embeddings().requires_grad_(False)
    parameters = [p for p in causal.parameters() if p.requires_grad]
    steps = [step for epoch in range(epochs) for step in _steps(lessons, epoch)]
    causal.train()
    minimise(parameters, steps, lambda step: loss(causal, step), LEARNING_RATE)
    causal.eval()


def minimise(
    parameters: Sequence[torch.nn.Parameter],
    steps: Sequence[T],
    loss_of: Callable[[T], torch.Tensor],
    learning_rate: float,
) -> None:
    """Change `parameters` by the loss of each step, with a learning rate that rises and falls."""
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=len(steps) + 1, pct_start=0.1
    )
    smoothed = None
    for step in (progress := tqdm(steps, unit="step")):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        smoothed = loss.item() if smoothed is None else 0.95 * smoothed + 0.05 * loss.item()
        progress.set_postfix(loss=f"{smoothed:.3f}")


def logits_after(causal: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """fp32 [prompts, vocabulary size], the logits of the token after each prompt."""
    tokens = [torch.tensor(prompt) for prompt in prompts]
    inputs = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    last = torch.tensor([len(prompt) - 1 for prompt in tokens])
    mask = torch.arange(inputs.shape[1]) <= last[:, None]
    with mixed_precision():
        states = causal.model(input_ids=inputs, attention_mask=mask.long()).last_hidden_state
        logits: torch.Tensor = causal.lm_head(states[torch.arange(len(prompts)), last])
    return logits.float()


def _steps(lessons: Sequence[Lesson], seed: int) -> Iterator[list[Lesson]]:
    """Steps of lessons of like length, which need little padding, in random order."""
    order = sorted(range(len(lessons)), key=lambda place: len(lessons[place][0]))
    starts = np.random.default_rng(seed).permutation(np.arange(0, len(order), PROMPTS))
    for start in starts:
        yield [lessons[place] for place in order[start : start + PROMPTS]]
