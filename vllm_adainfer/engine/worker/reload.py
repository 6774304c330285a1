"""Reload recalibrated artifacts without a restart."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.source import Pinned
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.worker.served_policies import Built, ServedPolicies
from vllm_adainfer.errors import AdaInferError

logger = get_logger(__name__)


def read_again(served: ServedPolicies, pinned: Mapping[str, Pinned] | None = None) -> Built:
    """Read the artifacts of the engine switch again. A collective: every rank must call it.

    `pinned` says by policy where its artifact lies and the digest its files must have, so that
    nothing is asked of the hub; None for whatever there is now. An AdaInferError if an artifact
    cannot be served without a restart, or ranks differ.
    """
    settings = served.model.settings

    def read() -> dict[str, Artifact]:
        if settings.artifact is None:
            raise AdaInferError("this engine has no artifact to reload")
        sources = settings.artifacts
        if pinned is not None:
            sources = {name: one.directory for name, one in pinned.items()}
        artifacts = {name: load_artifact(source) for name, source in sources.items()}
        for name, artifact in artifacts.items():
            if pinned is not None and artifact.digest != pinned[name].digest:
                raise AdaInferError(
                    f"artifact {settings.artifacts[name]!r} was overwritten during the "
                    "reload, or replicas see different files: reload again"
                )
        return artifacts

    return served.build_on_all_ranks(read)


def reload_policies(served: ServedPolicies, built: Built) -> list[str]:
    """Decide with the new policies from the next step on, and say so: a line for each policy."""
    served.replace(built)
    sources = served.model.settings.artifacts
    lines = [f"policy {name} was reloaded from {source}" for name, source in sources.items()]
    for line in lines:
        logger.info("%s", line)
    return lines
