"""Serve with recalibrated artifacts without a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_adainfer.config import read_settings
from vllm_adainfer.engine.admission import Admission
from vllm_adainfer.engine.compat import get_logger
from vllm_adainfer.engine.ranks import same_on_all_ranks
from vllm_adainfer.engine.requests import RunningRequests
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.artifact import Artifact, ArtifactConfig
from vllm_adainfer.policy.artifact_files import load_artifacts

logger = get_logger(__name__)

NOT_THE_SAME = "ranks have not read the same: is an artifact being replaced? Try again"


def reload_artifacts(model: Any, running: RunningRequests, vllm_config: VllmConfig) -> list[str]:
    """Read the artifacts that the switch names again, and decide by them from the next step on.

    Every rank does, or none: what they have read has to be the same.

    Returns:
        a line for each policy.

    Raises:
        AdaInferError: one cannot be served without a restart; all stay as they were.

    """
    settings = read_settings(vllm_config.additional_config)
    assert settings is not None
    failure: AdaInferError | None = None
    digest = 0
    try:
        if settings.artifact is None:
            raise AdaInferError("this engine has no artifact to read again")
        artifacts = load_artifacts(settings.artifacts)
        for name, artifact in artifacts.items():
            artifact.config.check_weights(model.fingerprint)
            check_replaces(name, artifact.config, model.artifacts[name].config, model.cuts)
        configs = {name: artifact.config for name, artifact in artifacts.items()}
        admission = Admission(settings, configs)
        digest = digest_of(artifacts)
    except AdaInferError as error:
        failure = error
    same = same_on_all_ranks(digest)  # every rank has to get here
    if failure is not None:
        raise failure
    if not same:
        raise AdaInferError(NOT_THE_SAME)
    model.use_artifacts(artifacts)
    running.use_admission(admission)
    lines = [
        f"policy {name} was read again from {source}" for name, source in settings.artifacts.items()
    ]
    for line in lines:
        logger.info("%s", line)
    return lines


def check_replaces(
    name: str, new: ArtifactConfig, old: ArtifactConfig, cuts: tuple[int, ...]
) -> None:
    """Whether a running engine can serve `new` in the place of `old`.

    The stack stays cut after `cuts`, and the scheduler knows which requests may exit from the time
    of the start.

    Raises:
        AdaInferError: it cannot.

    """
    for field in "architecture", "layers", "hidden_size", "vocab_size", "head_size":
        if getattr(new, field) != getattr(old, field):
            raise AdaInferError(
                f"policy {name} is for a model with {field} = {getattr(new, field)}, this one has "
                f"{getattr(old, field)}: calibrate for this model"
            )
    if not set(new.exit_points) <= set(cuts):
        raise AdaInferError(
            f"policy {name} has exit points {list(new.exit_points)}, this engine only "
            f"{list(cuts)}: restart it, or calibrate with --exit-points {','.join(map(str, cuts))}"
        )
    if set(new.label_ids) != set(old.label_ids):
        raise AdaInferError(f"policy {name} has other labels than before: restart the engine")
    if (new.max_tokens > 1) != (old.max_tokens > 1):
        raise AdaInferError(
            f"policy {name} was calibrated for {new.max_tokens} tokens, the one before for "
            f"{old.max_tokens}: restart the engine"
        )


def digest_of(artifacts: Mapping[str, Artifact]) -> int:
    """A number of 62 bits for all that they say."""
    digest = hashlib.sha256()
    for name, artifact in artifacts.items():
        digest.update(f"{name} {artifact.config.model_dump_json()}".encode())
        for part in sorted(artifact.tensors):
            raw = artifact.tensors[part].contiguous().view(torch.uint8)
            digest.update(part.encode() + raw.numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 2
