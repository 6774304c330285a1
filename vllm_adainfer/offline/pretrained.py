"""A model on disk or on the hub: its Hugging Face config and tokenizer, without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.engine_options import CALIBRATED_WITH, EngineOptions
from vllm_adainfer.engine.classes import MODELS, model_class_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.adapter import NamedAdapter, adapter_for

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def load_config_and_tokenizer(
    model: str, hf_overrides: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """The Hugging Face config and the tokenizer of `model`, a directory or hub id.

    `hf_overrides` change the config, as vLLM's option of that name does. That of a multimodal model
    is its language model's, with the architecture of the whole. An AdaInferError if there is no
    such model, or the plugin does not support its architecture.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        hf_config = AutoConfig.from_pretrained(model)
        hf_config.update(dict(hf_overrides or {}))
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise AdaInferError(
            f"--model {model} is neither a model directory nor a hub id that can be fetched "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
    architecture = (hf_config.architectures or ["none"])[0]
    if not model_class_of(architecture):
        raise AdaInferError(
            f"--model {model} has the architecture {architecture}, which is not supported yet; "
            f"supported: {', '.join(sorted(MODELS))}, and classifiers made of these"
        )
    text_config = hf_config.get_text_config()
    text_config.architectures = hf_config.architectures
    return text_config, tokenizer


@dataclass(frozen=True)
class Model:
    """A model that an artifact fits, a directory or hub id, and the LoRA adapter of its requests.

    `hf_config` is that of the language model; `options` are those that its engines have besides.
    """

    path: str
    hf_config: Any
    tokenizer: Any
    adapter: NamedAdapter | None = None
    hf_overrides: Mapping[str, Any] | None = None
    options: EngineOptions = field(default_factory=EngineOptions)

    @property
    def engine_settings(self) -> dict[str, Any]:
        """The `vllm.LLM` arguments of its engines."""
        return engine_settings(self.adapter, self.hf_overrides, self.options)

    @property
    def lora_request(self) -> LoRARequest | None:
        """The ``lora_request`` of `LLM.generate`."""
        return None if self.adapter is None else self.adapter.request

    def longest_prompt(self, max_tokens: int) -> int:
        """The most tokens a prompt may have if `max_tokens` are generated after it."""
        return int(self.hf_config.max_position_embeddings) - max_tokens


def engine_settings(
    adapter: NamedAdapter | None,
    hf_overrides: Mapping[str, Any] | None,
    options: EngineOptions,
) -> dict[str, Any]:
    """The `vllm.LLM` arguments for an adapter, and for options that change what is computed."""
    asked = {name: getattr(options, name) for name in CALIBRATED_WITH}
    asked["hf_overrides"] = None if hf_overrides is None else dict(hf_overrides)
    given = {name: value for name, value in asked.items() if value is not None}
    return given if adapter is None else {**adapter.engine_settings, **given}


def load_model(
    path: str,
    config: ArtifactConfig,
    adapter: NamedAdapter | None,
    hf_overrides: Mapping[str, Any] | None = None,
) -> Model:
    """The model at `path`, with `adapter` and the options that the artifact was calibrated with.

    An AdaInferError if it cannot be loaded, or the artifact is for another model or adapter.
    """
    own = adapter_for(config, adapter)
    found = load_config_and_tokenizer(path, hf_overrides)
    model = Model(path, *found, own, hf_overrides, config.engine_options)
    config.check_served_by(model.hf_config)
    return model
