"""Weights that come while an engine serves (`reload_weights`, trainers of RLHF)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.asking import ask_and_count, greedy
from tests.e2e.scripted import parts, running_of
from tests.tiny import FROM_ZERO, LAYERS

PROMPTS = [[7, 8, 9], [10, 11, 12, 13], [14, 15]]
NAME = "model.layers.4.mlp.down_proj.weight"


@pytest.fixture
def serving(small, tiny_model) -> Iterator[Any]:
    """An engine that is given other weights, and gets its own back."""
    yield small
    reload(small, tiny_model)


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """The same model after a step of training, say: one tensor has changed."""
    directory = tmp_path_factory.mktemp("trained") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.get_parameter(NAME).data.mul_(-3)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


def reload(llm: Any, directory: Path) -> None:
    """As vLLM does it for who asks (`collective_rpc`); what was cached belongs to the old ones."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
    llm.reset_prefix_cache()


def label_ids(llm: Any) -> list[int]:
    model, _, _ = parts(llm)
    [artifact] = model.artifacts.values()
    return list(artifact.config.label_ids)


def answers(llm: Any) -> tuple[list[list[int]], float, bool]:
    """Label tokens of requests that may exit, their mean depth, and what the engine reports."""
    found, depths = ask_and_count(llm, PROMPTS, greedy(allowed_token_ids=label_ids(llm)))
    _, runner, _ = parts(llm)
    counted = running_of(runner).idle_note().counted
    mean = sum(at * count for at, count in depths.items()) / len(PROMPTS)
    return [list(answer.token_ids) for answer in found], mean, counted["weights_differ"]


@torch.inference_mode()
def at_full_depth(llm: Any, directory: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return [[max(label_ids(llm), key=one.__getitem__)] for one in logits]


def rests(llm: Any, directory: Path) -> bool:
    """Whether requests run at full depth, with the answers of the model in `directory`."""
    found, depth, reported = answers(llm)
    if depth < LAYERS:
        assert (depth, reported) == (FROM_ZERO[0], False)
        return False
    assert (depth, reported) == (LAYERS, True)
    assert found == at_full_depth(llm, directory)
    return True


def test_other_weights_run_at_full_depth_until_those_of_the_calibration_are_back(
    serving, tiny_model, trained, caplog
):
    caplog.set_level("INFO", "vllm.adainfer.engine.model.early_exit")
    assert not rests(serving, tiny_model)
    reload(serving, trained)
    assert "they are inactive" in caplog.text
    assert rests(serving, trained)
    reload(serving, tiny_model)
    assert "the policies are active again" in caplog.text
    assert not rests(serving, tiny_model)


def test_weights_may_come_one_by_one(serving, tiny_model):
    """As from a trainer, which may send a part of them: each is known by its name."""
    model, _, _ = parts(serving)
    norms = {
        name: weight.detach()
        for name, weight in AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters()
        if "norm" in name
    }
    assert len(norms) > 2
    first, *others = norms.items()
    for part, resting in (
        ([first], False),
        ([(first[0], first[1] * 1.5)], True),
        (others, True),
        ([first], False),
    ):
        with torch.inference_mode():
            model.load_weights(part)
        serving.reset_prefix_cache()
        assert answers(serving)[1:] == (LAYERS if resting else FROM_ZERO[0], resting)


def test_weights_that_do_not_pass_the_model_may_be_any(serving, tiny_model):
    """In the format of vLLM's kernels they are copied into the parameters."""
    model, _, _ = parts(serving)
    weight = model.model.norm.weight.detach().clone()
    weights = [("model.norm.weight", weight)]
    with torch.inference_mode():
        serving.collective_rpc("reload_weights", args=(weights, None, False))
    serving.reset_prefix_cache()
    assert rests(serving, tiny_model)


def test_weights_that_fail_half_way_may_be_any(serving):
    model, _, _ = parts(serving)
    wrong = [("model.norm.weight", torch.ones(64)), ("model.norm.weight", torch.ones(3))]
    with pytest.raises(AssertionError, match="Attempted to load weight"), torch.inference_mode():
        model.load_weights(wrong)
    assert answers(serving)[1:] == (LAYERS, True)
