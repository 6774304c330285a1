"""The oracle: "run with these exit decisions" in plain transformers, slow and obvious."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Scores closer than this are a tie: fp32 sums in another order may swap them.
TIE = 1e-3


@torch.inference_mode()
def hidden_states(model: Any, prompt: list[int]) -> list[Tensor]:
    """Residual stream [prompt, hidden size] after 0, 1, ... all layers (before the norm)."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output: states.append(
                output if isinstance(output, Tensor) else output[0]
            )
        )
        for layer in model.model.layers
    ]
    model(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    return [torch.empty(0), *(state[0] for state in states)]


@torch.inference_mode()
def token_after(model: Any, prompt: list[int], layer: int) -> int | None:
    """The token read by final norm and LM head after `layer` layers; None on a tie."""
    state = hidden_states(model, prompt)[layer][-1:]
    best = model.lm_head(model.model.norm(state))[0].topk(2)
    return None if best.values[0] - best.values[1] < TIE else int(best.indices[0])


def continuation(model: Any, prompt: list[int], tokens: int, depth: int) -> list[int | None]:
    """Greedy continuation at full depth; ends with None at the first tie."""
    produced: list[int | None] = []
    for _ in range(tokens):
        token = token_after(model, [*prompt, *(t for t in produced if t is not None)], depth)
        produced.append(token)
        if token is None:
            break
    return produced


def same(found: list[int], expected: list[int | None]) -> bool:
    """Whether `found` is `expected` as far as the oracle is sure."""
    sure = expected[: expected.index(None)] if None in expected else expected
    return found[: len(sure)] == sure
