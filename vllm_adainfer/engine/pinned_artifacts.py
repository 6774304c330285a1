"""Pins the artifacts of the switch, so that all processes of an engine read the same files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact, load_config_and_digest
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import CONFIG_KEY, Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class PinnedSwitch(dict[str, Any]):
    """The engine switch, with the digests of its artifacts' files at config time, by policy name.

    vLLM copies ``additional_config``, sends it to its processes, and puts it as JSON into the key
    of its compile cache. An attribute is copied and sent, but is not part of the JSON.
    """

    pins: Mapping[str, str]


def pin_artifacts(vllm_config: VllmConfig, settings: Settings) -> dict[str, ArtifactConfig]:
    """Load the configs of the artifacts, by policy name, and pin their files in `vllm_config`."""
    if not settings.artifacts:
        return {}
    found = {name: load_config_and_digest(source) for name, source in settings.artifacts.items()}
    assert isinstance(vllm_config.additional_config, dict)
    switch = PinnedSwitch(vllm_config.additional_config[CONFIG_KEY])
    switch.pins = {name: digest for name, (_, digest) in found.items()}
    # A new mapping, because the user may start other engines with the same one.
    vllm_config.additional_config = {**vllm_config.additional_config, CONFIG_KEY: switch}
    return {name: config for name, (config, _) in found.items()}


def served_configs(vllm_config: VllmConfig, settings: Settings) -> dict[str, ArtifactConfig]:
    """The configs of the pinned artifacts, by policy name, for a process that starts.

    An AdaInferError if an artifact is no longer the one that was pinned.
    """
    found = {name: load_config_and_digest(source) for name, source in settings.artifacts.items()}
    _check_pins(vllm_config, settings, {name: digest for name, (_, digest) in found.items()})
    return {name: config for name, (config, _) in found.items()}


def served_artifacts(vllm_config: VllmConfig, settings: Settings) -> dict[str, Artifact]:
    """The pinned artifacts, as `served_configs`."""
    artifacts = {name: load_artifact(source) for name, source in settings.artifacts.items()}
    _check_pins(vllm_config, settings, {name: one.digest for name, one in artifacts.items()})
    return artifacts


def _check_pins(vllm_config: VllmConfig, settings: Settings, digests: Mapping[str, str]) -> None:
    config = vllm_config.additional_config
    switch = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    for name, digest in digests.items():
        if isinstance(switch, PinnedSwitch) and switch.pins[name] != digest:
            raise AdaInferError(
                f"artifact {settings.artifacts[name]!r} was overwritten while the engine started: "
                "start it again"
            )
