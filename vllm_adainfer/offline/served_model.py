"""The model of an artifact that is served by its own name, as speculators are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact_config, load_details
from vllm_adainfer.artifact.source import (
    CALIBRATION_FILE,
    CARD_FILE,
    CONFIG_FILE,
    FOLDER,
    POLICY_FILE,
    locate,
)
from vllm_adainfer.errors import AdaInferError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def for_its_model(source: str, given: Sequence[str]) -> list[str] | None:
    """The arguments of ``vllm serve`` for the model of an artifact; None if `source` is none.

    `given` are the command's other arguments. Options that the policy was calibrated with, such as
    ``--quantization``, are added where they are missing.

    An AdaInferError if the model cannot be found, or the policy is for an adapter that is not
    given.
    """
    if not _is_artifact(source):
        return None
    config = load_artifact_config(source)
    model = _model_of(config, locate(source))
    if model is None:
        raise AdaInferError(
            f"{source} was calibrated for {config.base_model}, which is neither a directory here "
            f"nor a hub id: give its model, vllm-adainfer serve MODEL --policy {source}"
        )
    names = {argument.partition("=")[0].replace("_", "-") for argument in given}
    if config.adapter is not None and "--lora-modules" not in names:
        raise AdaInferError(
            f"{source} was calibrated with the LoRA adapter {config.adapter.name}: add "
            f"--enable-lora --lora-modules {config.adapter.name}=DIR"
        )
    options = config.engine_options.arguments.items()
    return [model, *given, *(part for one in options if one[0] not in names for part in one)]


def _is_artifact(source: str) -> bool:
    """Whether a directory, or a repository of the hub, holds an artifact."""
    if Path(source).exists():
        return (Path(source) / POLICY_FILE).is_file()
    repo, _, revision = source.partition("@")
    if not HUB_ID.fullmatch(repo):
        return False
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_download(repo, POLICY_FILE, revision=revision or None)
    except (OSError, HFValidationError):  # not there, or no hub: vLLM says what is wrong
        return False
    return True


def _model_of(config: ArtifactConfig, directory: Path) -> str | None:
    """The model that an artifact is bundled with, or that its files name, and is to be had."""
    if directory.name == FOLDER and (directory.parent / CONFIG_FILE).is_file():
        return str(directory.parent)
    for name in _names(config, directory):
        if HUB_ID.fullmatch(name) or Path(name).is_dir():
            return name
    return None


def _names(config: ArtifactConfig, directory: Path) -> Iterator[str]:
    """What an artifact's files call its model: a hub id, or where the calibration found it."""
    from huggingface_hub import ModelCard

    if (directory / CARD_FILE).is_file():
        card = ModelCard((directory / CARD_FILE).read_text(encoding="utf-8"))
        yield str(card.data.get("base_model"))
    if (directory / CALIBRATION_FILE).is_file():
        yield str(load_details(str(directory)).get("model"))
    yield config.base_model
