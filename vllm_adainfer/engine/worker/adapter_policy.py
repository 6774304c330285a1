"""Policies bundled with LoRA adapters: in use as soon as vLLM has loaded the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import LAST_TOKEN
from vllm_adainfer.artifact.fields import Adapter
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.source import bundled
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.lora import adapter_directory
from vllm_adainfer.engine.runner.adapters import fingerprint_of
from vllm_adainfer.engine.startup.banner import policy_banner
from vllm_adainfer.engine.worker.served_policies import Built, ServedPolicies
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import NO_POLICY

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = get_logger(__name__)


def bundled_policy(served: ServedPolicies, adapter: LoRARequest) -> Built:
    """The policy bundled with an adapter that vLLM is about to load, by the adapter's name, if any.

    A collective: every rank must call it. It replaces an earlier one of this name. Policies of the
    engine switch take precedence. An AdaInferError if this engine cannot serve it.
    """
    settings = served.model.settings
    name = adapter.lora_name
    if settings.exit_points is None:
        if settings.record is None and _bundled_folder(adapter) is not None:
            logger.warning(
                "the policy bundled with the adapter %s is not used: start the engine with the "
                'layers of its exit points, "exit_points": [...]',
                name,
            )
        return {}

    def read() -> dict[str, Artifact]:
        artifact = _read_bundled(adapter, served.model)
        return {} if artifact is None else {name: artifact}

    built = served.build_on_all_ranks(read)
    for artifact, _ in built.values():
        mode = served.vllm_config.model_config.logprobs_mode
        line = policy_banner(name, artifact.config, settings, mode)
        logger.info("With the adapter %s: %s", name, line)
    return built


def _read_bundled(adapter: LoRARequest, model: Any) -> Artifact | None:
    """The artifact bundled with an adapter; None without one, or if the switch names it already."""
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
    config = artifact.config
    if config.adapter is None or config.adapter.fingerprint != own.fingerprint:
        raise AdaInferError(
            f"{folder} was not calibrated with the adapter that it is bundled with: calibrate with "
            f"--lora {name}={folder.parent}, or remove it"
        )
    return replace(artifact, config=config.model_copy(update={"adapter": own}))


def _bundled_folder(adapter: LoRARequest) -> Path | None:
    """The directory of the artifact bundled with an adapter; None without one.

    Also None if the adapter cannot be found: vLLM then fails to load it, and says why.
    """
    try:
        return bundled(adapter_directory(adapter.lora_path))
    except OSError:
        return None
