"""Our table of architectures against vLLM's."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.registry import _MULTIMODAL_MODELS, _TEXT_GENERATION_MODELS

from vllm_adainfer.engine.classes import MODELS
from vllm_adainfer.engine.model.early_exit import EarlyExit

# Subclasses of Llama's class that are not in the table, and why.
LEFT_OUT = {
    "Llama4ForCausalLM": "a mixture of experts",
    "TeleChat2ForCausalLM": "transformers has no config to test it with",
    "TeleFLMForCausalLM": "transformers has no config to test it with",
}


def stock_class(architecture: str) -> Any:
    module, name = (_TEXT_GENERATION_MODELS | _MULTIMODAL_MODELS)[architecture]
    path = module if "." in module else f"vllm.model_executor.models.{module}"
    return getattr(importlib.import_module(path), name)


@pytest.mark.parametrize("architecture", MODELS)
def test_each_class_of_ours_is_vllms_own_with_exit_points(architecture):
    module, _, name = MODELS[architecture].partition(":")
    ours = getattr(importlib.import_module(module), name)
    assert issubclass(ours, stock_class(architecture))
    assert ours.__mro__.index(EarlyExit) < ours.__mro__.index(stock_class(architecture))


def test_every_subclass_of_vllms_llama_has_exit_points_unless_left_out():
    llamas = {
        architecture
        for architecture in _TEXT_GENERATION_MODELS
        if issubclass(stock_class(architecture), LlamaForCausalLM)
    }
    assert llamas - MODELS.keys() == LEFT_OUT.keys()
