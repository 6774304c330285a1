"""A model as it is on disk or on the hub: its Hugging Face config and tokenizer, no weights."""

from __future__ import annotations

from typing import Any

from vllm_adainfer.engine.classes import MODELS
from vllm_adainfer.errors import AdaInferError


def load_config_and_tokenizer(model: str) -> tuple[Any, Any]:
    """The Hugging Face config and the tokenizer of `model`, a directory or hub id.

    Of a multimodal model the config is that of its language model, with the model's architecture.

    Raises:
        AdaInferError: there is no such model, or the plugin does not support its architecture.

    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        hf_config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise AdaInferError(
            f"--model {model} is neither a model directory nor a hub id that can be fetched "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
    architecture = (hf_config.architectures or ["none"])[0]
    if architecture not in MODELS:
        raise AdaInferError(
            f"--model {model} is of the architecture {architecture}, which is not supported yet; "
            f"supported: {', '.join(MODELS)}"
        )
    text_config = hf_config.get_text_config()
    text_config.architectures = hf_config.architectures
    return text_config, tokenizer
