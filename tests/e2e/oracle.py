"""The oracle: "run with these exit decisions" in plain transformers, slow and obvious."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

# Scores closer than this are a tie: fp32 sums in another order may swap them.
TIE = 1e-3
# As a share of a state's size; moves what the head reads by 2e-4, as vLLM's own rounding may.
NUDGE = 1e-5


def decoder_layers(model: Any) -> Any:
    """The decoder layers of any transformers model for causal LM."""
    return getattr(model.model, "decoder", model.model).layers


@torch.inference_mode()
def hidden_states(model: Any, prompt: list[int]) -> list[Tensor]:
    """Residual stream [prompt, hidden size] after 0, 1, ... all layers (before the norm)."""
    states: list[Tensor] = []
    layers = decoder_layers(model)
    with ExitStack() as hooks:
        before = layers[0].register_forward_pre_hook(lambda _m, args: states.append(args[0]))
        hooks.callback(before.remove)
        for layer in layers:
            hook = layer.register_forward_hook(lambda _m, _a, output: states.append(first(output)))
            hooks.callback(hook.remove)
        model(torch.tensor([prompt]), use_cache=False)
    return [state[0] for state in states]


def last_states(model: Any, prompts: list[list[int]]) -> list[list[Tensor]]:
    """Of each prompt, its last row [1, hidden size] after each number of layers."""
    return [[state[-1:] for state in hidden_states(model, prompt)] for prompt in prompts]


def first(output: Any) -> Tensor:
    """Some layers of transformers return a tuple."""
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    return state


@contextmanager
def stuck(layers: Any) -> Iterator[None]:
    """These layers hand on what they get unchanged."""

    def hand_on(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return state if isinstance(output, Tensor) else (state, *output[1:])

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(hand_on, with_kwargs=True).remove)
        yield


@contextmanager
def nudged(model: Any, seed: int) -> Iterator[None]:
    """What each layer yields is off by about as much as fp32 sums in another order are.

    Where a router's experts tie but for rounding, some seeds take the one, and some the other.
    """
    generator = torch.Generator().manual_seed(seed)

    def nudge(_module: Any, _args: Any, output: Any) -> Any:
        state = first(output)
        noise = torch.randn(state.shape, generator=generator)
        state = state + NUDGE * state.abs().mean(-1, keepdim=True) * noise
        return state if isinstance(output, Tensor) else (state, *output[1:])

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.callback(layer.register_forward_hook(nudge).remove)
        yield


@torch.inference_mode()
def head_inputs(model: Any, token_ids: list[int], layers: int) -> Tensor:
    """What the LM head reads of each token, [tokens, head size], if it leaves after `layers`."""
    read: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    with stuck(decoder_layers(model)[layers:]):
        model(torch.tensor([token_ids]), use_cache=False)
    hook.remove()
    return read[0][0]


@torch.inference_mode()
def token_after(model: Any, prompt: list[int], layer: int) -> int | None:
    """The token read by final norm and LM head after `layer` layers; None on a tie."""
    best = model.lm_head(head_inputs(model, prompt, layer)[-1]).topk(2)
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
