"""Objects that are decided early are those of the heads; all others are stock vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.byte_model import byte_tokenizer, save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.drafted_traffic import Ask, counted_drafts, prompts, served
from tests.e2e.objects import ENGINE, POOLED_FROM, params, save_policy
from tests.full import needed
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.files import load_artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory) -> Callable[[str], Path]:
    def made(probe: str) -> Path:
        directory = tmp_path_factory.mktemp("artifact") / "policy"
        more = {"pooled_from": POOLED_FROM} if probe == "pooled-label-head" else {}
        return save_policy(model, directory, probe=probe, **more)

    return made


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return tiny_engine(model, None, **ENGINE)


class Oracle:
    """What heads say of an object, by plain transformers."""

    def __init__(self, model: Path, artifact: Artifact) -> None:
        self.model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.artifact, self.tokenizer = artifact, byte_tokenizer()
        found = artifact.config.objects
        assert found is not None
        self.objects = found

    @torch.no_grad()
    def states(self, tokens: list[int]) -> tuple[torch.Tensor, ...]:
        """After so many layers, the states of the rows of these tokens."""
        return self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states

    def early(self, prompt: str, level: int) -> tuple[str | None, int | None]:
        """The text that is written early, and after which layer; None for neither."""
        tokens, layer = self.early_tokens(prompt, level)
        return None if tokens is None else self.tokenizer.decode(tokens), layer

    def early_tokens(self, prompt: str, level: int) -> tuple[tuple[int, ...] | None, int | None]:
        """Its tokens, and after which layer."""
        config, tensors = self.artifact.config, self.artifact.tensors
        ids = self.tokenizer.encode(prompt)
        rows = torch.tensor(self.objects.rows) + len(ids) - 1
        states = self.states([*ids, *self.objects.guess])
        for index, layer in enumerate(config.exit_points):
            read = states[layer][0, rows]
            if config.is_pooled:
                normed = states[layer][0] / states[layer][0].pow(2).mean(-1, True).add(1e-6).sqrt()
                mean = normed[POOLED_FROM : len(ids)].mean(0)
                read = torch.cat([normed[rows], mean.expand(len(rows), -1)], dim=1)
            weight, bias = (tensors[f"exit.{layer}.head_{name}"] for name in ("weight", "bias"))
            sizes = [len(one.values) for one in self.objects.fields]
            scores = [
                own @ row + at
                for row, own, at in zip(read, weight.split(sizes), bias.split(sizes), strict=True)
            ]
            gaps = [(two := one.softmax(0).topk(2).values)[0] - two[1] for one in scores]
            if min(gaps) >= tensors["thresholds"][level, index]:
                places = [int(one.argmax()) for one in scores]
                return self.objects.written(places), layer
        return None, None


@pytest.mark.parametrize("probe", needed(1 if IS_V2 else 2, of=["label-head", "pooled-label-head"]))
def test_objects_are_those_of_the_heads_where_these_are_sure_and_stocks_elsewhere(
    model, policy, stock, probe
):
    artifact = policy(probe)
    ours = tiny_engine(model, {"artifact": str(artifact), "min_rows_saved": 1}, **ENGINE)
    oracle = Oracle(model, load_artifact(artifact))
    texts = [one for one in prompts(3, 16 if IS_V2 else 40, 100) if len(one) > POOLED_FROM]
    asks = [Ask(text, params(), step=place // 3) for place, text in enumerate(texts)]
    theirs = served(stock, asks)
    with counted_drafts(ours):
        found = served(ours, asks)
    early, depths = 0, {}
    for ask, own, other in zip(asks, found, theirs, strict=True):
        expected, layer = oracle.early(ask.prompt, level=1)
        early += expected is not None
        if layer is not None:
            depths[layer] = depths.get(layer, 0) + 1
        assert own.texts[0] == (expected or other.texts[0]), ask
        assert own.ends[0][0] == ("stop" if expected else other.ends[0][0])
    some = len(asks) // 8
    assert some < early < len(asks) - some, early
    assert len(depths) > 1
