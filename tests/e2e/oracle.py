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


class Sequence:
    """One sequence through transformers' Llama, a row at a time, with its own K and V by layer.

    What a row that leaves early puts into the layers it skips is what `propagate` promises.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.keys: list[Tensor] = []  # by layer, [heads, positions, head size]
        self.values: list[Tensor] = []

    @torch.inference_mode()
    def restart(self, token_ids: list[int]) -> None:
        """K and V of `token_ids` at full depth, and nothing else."""
        config = self.model.config
        head_dim = config.hidden_size // config.num_attention_heads
        empty = torch.empty(config.num_key_value_heads, 0, head_dim)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers
        if token_ids:
            self.run(token_ids, config.num_hidden_layers)

    @torch.inference_mode()
    def run(self, token_ids: list[int], layers: int) -> Tensor:
        """Run the next tokens through `layers`; the last one's state, normed, [hidden size]."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        model = self.model.model
        first, rows = self.keys[0].shape[1], len(token_ids)
        hidden = model.embed_tokens(torch.tensor(token_ids))
        cos, sin = model.rotary_emb(hidden[None], torch.arange(first, first + rows)[None])
        sees = torch.arange(first + rows) <= torch.arange(first, first + rows).unsqueeze(1)
        for index, layer in enumerate(model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            heads = (rows, -1, attention.head_dim)
            query, key, value = (
                projection(normed).view(heads).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = (x[0] for x in apply_rotary_pos_emb(query[None], key[None], cos, sin))
            self.keys[index] = torch.cat([self.keys[index], key], dim=1)
            self.values[index] = torch.cat([self.values[index], value], dim=1)
            if index >= layers:  # it has left: keys and values are all that is made
                continue
            groups = query.shape[0] // key.shape[0]
            mixed = torch.nn.functional.scaled_dot_product_attention(
                query,
                self.keys[index].repeat_interleave(groups, dim=0),
                self.values[index].repeat_interleave(groups, dim=0),
                attn_mask=sees,
            )
            hidden = hidden + attention.o_proj(mixed.transpose(0, 1).reshape(rows, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        normed_state: Tensor = model.norm(hidden)[-1]
        return normed_state
