"""Serve with recalibrated artifacts without a restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig

from vllm_adainfer.config import read_settings
from vllm_adainfer.engine.admission import Admission
from vllm_adainfer.engine.build_loop import monitors_of, policies_of
from vllm_adainfer.engine.compat import get_logger
from vllm_adainfer.engine.ranks import RANKS_DIFFER, same_on_all_ranks
from vllm_adainfer.engine.requests import RunningRequests
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.artifact import Artifact, ArtifactConfig
from vllm_adainfer.policy.artifact_files import load_artifacts
from vllm_adainfer.policy.digest import digest_of

logger = get_logger(__name__)


def reload_artifacts(model: Any, running: RunningRequests, vllm_config: VllmConfig) -> list[str]:
    """Read the artifacts of the engine switch again, and decide by them from the next step on.

    Either every rank does, or none: all must have read the same.

    Args:
        model: an `EarlyExit`.
        running: the worker's requests.
        vllm_config: of the engine.

    Returns:
        a line for each policy.

    Raises:
        AdaInferError: an artifact cannot be served without a restart; all stay as they were.

    """
    settings = read_settings(vllm_config.additional_config)
    assert settings is not None
    cuts = model.loop.policies.exit_points

    def read() -> tuple[dict[str, Artifact], Admission]:
        if settings.artifact is None:
            raise AdaInferError("this engine has no artifact to read again")
        artifacts = load_artifacts(settings.artifacts)
        for name, artifact in artifacts.items():
            artifact.config.check_weights(model.fingerprint)
            check_replaces(name, artifact.config, model.artifacts[name].config, cuts)
        # Those that came with adapters stay.
        artifacts = {**model.artifacts, **artifacts}
        configs = {name: artifact.config for name, artifact in artifacts.items()}
        return artifacts, Admission.of(vllm_config, settings, configs)

    model.artifacts, admission = read_on_all_ranks(read)
    model.loop.use_policies(policies_of(model, cuts), monitors_of(model))
    running.use_admission(admission)
    lines = [
        f"policy {name} was read again from {source}" for name, source in settings.artifacts.items()
    ]
    for line in lines:
        logger.info("%s", line)
    return lines


def read_on_all_ranks(
    read: Callable[[], tuple[dict[str, Artifact], Admission]],
) -> tuple[dict[str, Artifact], Admission]:
    """What `read` returns, if every rank has read the same artifacts; all ranks must call this.

    Raises:
        AdaInferError: they have not, or `read` has raised it here.

    """
    failure: AdaInferError | None = None
    found = None
    try:
        found = read()
    except AdaInferError as error:
        failure = error
    same = same_on_all_ranks(0 if found is None else digest_of(found[0]))
    if found is None:
        assert failure is not None
        raise failure
    if not same:
        raise AdaInferError(RANKS_DIFFER)
    return found


def check_replaces(
    name: str, new: ArtifactConfig, old: ArtifactConfig, cuts: tuple[int, ...]
) -> None:
    """Check that a running engine can serve `new` in the place of `old`.

    The stack stays cut after `cuts`, and the scheduler has known since the start which requests
    may exit.

    Raises:
        AdaInferError: it cannot.

    """
    for field in "architecture", "layers", "hidden_size", "vocab_size", "head_size":
        if getattr(new, field) != getattr(old, field):
            raise AdaInferError(
                f"policy {name} is for a model with {field} = {getattr(new, field)}, this one has "
                f"{getattr(old, field)}: calibrate for this model"
            )
    if new.adapter != old.adapter:
        raise AdaInferError(
            f"policy {name} is for another LoRA adapter than before, or for other weights of it: "
            "restart the engine"
        )
    if not set(new.exit_points) <= set(cuts):
        raise AdaInferError(
            f"policy {name} has exit points {list(new.exit_points)}, this engine only "
            f"{list(cuts)}: restart it, or calibrate with --exit-points {','.join(map(str, cuts))}"
        )
    new_texts, old_texts = ({c.text: c.token_ids for c in one.choices} for one in (new, old))
    if new_texts != old_texts:
        raise AdaInferError(
            f"policy {name} has other choices than before, or other tokens for them: restart the "
            "engine"
        )
    if set(new.label_ids) != set(old.label_ids):
        raise AdaInferError(f"policy {name} has other labels than before: restart the engine")
    if new.label_pool != old.label_pool:
        serves = ("its labels as a whole", "any of its labels")[new.label_pool]
        raise AdaInferError(
            f"policy {name} serves {serves}, unlike the one before: restart the engine"
        )
    if (new.max_tokens > 1) != (old.max_tokens > 1):
        raise AdaInferError(
            f"policy {name} was calibrated for {new.max_tokens} tokens, the one before for "
            f"{old.max_tokens}: restart the engine"
        )
    if (new.risk == "probability") != (old.risk == "probability"):
        raise AdaInferError(
            f"policy {name} bounds {new.risk}, the one before {old.risk}, and other requests exit "
            "under the one than under the other: restart the engine"
        )
    if new.label_mass != old.label_mass:
        certified = ("does not certify", "certifies")[new.label_mass]
        raise AdaInferError(
            f"policy {name} {certified} the label mass, unlike the one before: restart the engine"
        )
