"""A policy that lies beside a LoRA adapter serves as soon as vLLM has loaded the adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_adainfer.artifact.config import Adapter, Artifact
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.lora import adapter_directory
from vllm_adainfer.engine.runner.adapters import fingerprint_of
from vllm_adainfer.engine.scheduler.rest_of_choice import check_tokenizer
from vllm_adainfer.engine.startup.banner import policy_banner
from vllm_adainfer.engine.startup.refusals import refuse_unknown_questions
from vllm_adainfer.engine.worker.service import Service, built_on_all_ranks
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import NO_POLICY

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = get_logger(__name__)

FOLDER = "adainfer"  # in the adapter's directory


def policy_beside(model: Any, vllm_config: VllmConfig, adapter: LoRARequest) -> Service | None:
    """What serves now with the policy beside an adapter, None if there is none.

    All ranks must call this. The policy gets the adapter's name, and replaces one that came under
    this name before. Policies of the engine switch go before it.

    Args:
        model: an `EarlyExit`.
        vllm_config: of the engine.
        adapter: which vLLM is about to load.

    Raises:
        AdaInferError: this engine cannot serve the policy.

    """
    settings = model.settings
    name = adapter.lora_name
    if settings.exit_points is None:
        if settings.record is None and _folder_beside(adapter) is not None:
            logger.warning(
                "the policy beside the adapter %s is not used: name the layers of its exit points "
                'when the engine starts, "exit_points": [...]',
                name,
            )
        return None

    def read() -> dict[str, Artifact]:
        artifact = _beside(adapter, model)
        if artifact is None:
            return {}
        refuse_unknown_questions(settings, {name: artifact.config})
        if artifact.config.choices:
            tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
            check_tokenizer(tokenizer, name, artifact.config.choices)
        return {name: artifact}

    built = built_on_all_ranks(model, vllm_config, read)
    if not built:
        return None
    artifact, _ = built[name]
    mode = vllm_config.model_config.logprobs_mode
    logger.info(
        "With the adapter %s: %s", name, policy_banner(name, artifact.config, settings, mode)
    )
    return Service.having(model, vllm_config, built)


def without_policies(model: Any, vllm_config: VllmConfig, adapters: Iterable[str]) -> Service:
    """What serves now without the policies that came with `adapters`."""
    service = Service.having(model, vllm_config, {}, adapters)
    for name in adapters:
        logger.info("AdaInfer drops policy %s together with its adapter", name)
    return service


def _beside(adapter: LoRARequest, model: Any) -> Artifact | None:
    """The artifact beside an adapter as its policy; None if there is none, or not needed.

    Raises:
        AdaInferError: it is damaged, or for another model, other exit points or another adapter.

    """
    name, folder = adapter.lora_name, _folder_beside(adapter)
    if folder is None:
        return None
    own = Adapter(name=name, fingerprint=fingerprint_of(adapter.lora_path) or "")
    at_start = {policy: model.artifacts[policy].config for policy in model.settings.artifacts}
    if own in [config.adapter for config in at_start.values()]:
        return None
    if name in at_start or name == NO_POLICY:
        raise AdaInferError(
            f"{folder} holds a policy, and {name} is the name of another one: load the adapter "
            "under another name"
        )
    artifact = load_artifact(str(folder))
    config, cuts = artifact.config, model.loop.policies.exit_points
    config.check_weights(model.fingerprint)
    if config.adapter is None or config.adapter.fingerprint != own.fingerprint:
        raise AdaInferError(
            f"{folder} was not calibrated with the adapter beside it: calibrate with --lora "
            f"{name}={folder.parent}, or move it away"
        )
    if not set(config.exit_points) <= set(cuts):
        raise AdaInferError(
            f"{folder} has exit points {list(config.exit_points)}, this engine only {list(cuts)}: "
            'name them when it starts, "exit_points": [...], or calibrate with --exit-points '
            f"{','.join(map(str, cuts))}"
        )
    return replace(artifact, config=config.model_copy(update={"adapter": own}))


def _folder_beside(adapter: LoRARequest) -> Path | None:
    """Where an adapter's artifact lies; None without one, or without the adapter.

    vLLM then fails to load the adapter, and says why.
    """
    try:
        folder = adapter_directory(adapter.lora_path) / FOLDER
        return folder if folder.is_dir() else None
    except OSError:
        return None
