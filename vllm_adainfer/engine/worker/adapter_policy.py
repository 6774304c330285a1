"""Policies bundled with LoRA adapters: in use as soon as vLLM has loaded the adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import LAST_TOKEN
from vllm_adainfer.artifact.fields import Adapter
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


def bundled_policy(model: Any, vllm_config: VllmConfig, adapter: LoRARequest) -> Service | None:
    """The current policies with the one bundled with `adapter`; None if it has none.

    A collective: every rank must call it. The policy takes the adapter's name, and replaces an
    earlier one of this name. Policies of the engine switch take precedence.

    Args:
        model: an `EarlyExit`.
        vllm_config: the engine's config.
        adapter: the adapter that vLLM is about to load.

    Raises:
        AdaInferError: this engine cannot serve the policy.

    """
    settings = model.settings
    name = adapter.lora_name
    if settings.exit_points is None:
        if settings.record is None and _bundled_folder(adapter) is not None:
            logger.warning(
                "the policy bundled with the adapter %s is not used: start the engine with the "
                'layers of its exit points, "exit_points": [...]',
                name,
            )
        return None

    def read() -> dict[str, Artifact]:
        artifact = _read_bundled(adapter, model)
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
    line = policy_banner(name, artifact.config, settings, mode)
    logger.info("With the adapter %s: %s", name, line)
    return Service.with_policies(model, vllm_config, built)


def without_policies(model: Any, vllm_config: VllmConfig, adapters: Iterable[str]) -> Service:
    """The current policies without those bundled with `adapters`."""
    service = Service.with_policies(model, vllm_config, {}, adapters)
    for name in adapters:
        logger.info("AdaInfer dropped policy %s together with its adapter", name)
    return service


def _read_bundled(adapter: LoRARequest, model: Any) -> Artifact | None:
    """The artifact bundled with an adapter; None without one, or if the switch names it already.

    Raises:
        AdaInferError: it is damaged, or is for another model, adapter or other exit points.

    """
    name, folder = adapter.lora_name, _bundled_folder(adapter)
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
    if name.endswith(f":{LAST_TOKEN}"):
        raise AdaInferError(
            f"{folder} holds a policy, and {name} would be the name of a part of another one: load "
            "the adapter under another name"
        )
    artifact = load_artifact(str(folder))
    config, cuts = artifact.config, model.loop.policies.exit_points
    model.check_calibrated(config)
    if config.adapter is None or config.adapter.fingerprint != own.fingerprint:
        raise AdaInferError(
            f"{folder} was not calibrated with the adapter that it is bundled with: calibrate with "
            f"--lora {name}={folder.parent}, or remove it"
        )
    if config.student is not None:
        raise AdaInferError(
            f"{folder} has a student, and only policies that the engine starts with may have one: "
            "name it in the engine switch, or calibrate without --student"
        )
    if not set(config.all_exit_points) <= set(cuts):
        raise AdaInferError(
            f"{folder} has exit points {list(config.all_exit_points)}, this engine only "
            f'{list(cuts)}: start it with "exit_points": [...], or calibrate with --exit-points '
            f"{','.join(map(str, cuts))}"
        )
    return replace(artifact, config=config.model_copy(update={"adapter": own}))


def _bundled_folder(adapter: LoRARequest) -> Path | None:
    """The directory of the artifact bundled with an adapter; None without one.

    Also None if the adapter cannot be found: vLLM then fails to load it, and says why.
    """
    try:
        folder = adapter_directory(adapter.lora_path) / FOLDER
        return folder if folder.is_dir() else None
    except OSError:
        return None
