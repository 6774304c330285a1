"""What the oracle of random patterns lets pass: rounding that decides between experts, no more."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.oracle import head_inputs
from tests.e2e.patterns import CLOSE, Pattern, Request, wrong
from tests.e2e.scripted import Ran
from tests.families import FAMILIES, SHAPE
from tests.tiny import LAYERS

PROMPT = [5, 17, 40, 9, 23]


@pytest.fixture(scope="module")
def tied() -> tuple[Any, Tensor, Tensor]:
    """A mixture whose last router ties at the last token, and its state with either expert."""
    torch.manual_seed(0)
    config = FAMILIES["mixtral"](**SHAPE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    router = model.model.layers[-1].mlp.gate
    seen: list[Tensor] = []
    hook = router.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    head_inputs(model, PROMPT, LAYERS)
    hook.remove()
    read = seen[0].reshape(-1, seen[0].shape[-1])[-1]
    scores = router.weight.data @ read
    _, second, third = scores.topk(3).indices.tolist()

    def with_lead(lead: float) -> Any:
        changed = deepcopy(model)
        add = (scores[second] - scores[third] + lead) / read.square().sum() * read
        changed.model.layers[-1].mlp.gate.weight.data[third] += add
        return changed

    one, other = (head_inputs(with_lead(lead), PROMPT, LAYERS)[-1] for lead in (-1e-4, 1e-4))
    assert (one - other).abs().max() > 2 * CLOSE
    return with_lead(0), one, other


def found_wrong(model: Any, state: Tensor) -> bool:
    pattern = Pattern([Request(PROMPT, max_tokens=0, seed=0)], [[]])
    ran = Ran(first=0, rows=len(PROMPT), layers=LAYERS, sampled=False, state=state)
    return wrong(model, pattern, {"0": [ran]}) != []


def test_a_state_may_come_of_either_expert_where_two_tie(tied):
    model, *states = tied
    assert [found_wrong(model, state) for state in states] == [False, False]


def test_a_state_of_neither_expert_is_found_where_two_tie(tied):
    model, one, other = tied
    off = torch.zeros_like(one)
    off[3] = 1.5 * CLOSE
    too_early = head_inputs(model, PROMPT, LAYERS - 1)[-1]
    states = (one + other) / 2, one + off, other - off, too_early
    assert [found_wrong(model, state) for state in states] == [True] * len(states)
