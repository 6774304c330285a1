"""Serve with recalibrated artifacts without a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig

from vllm_adainfer.artifact.config import Artifact, ArtifactConfig
from vllm_adainfer.artifact.files import load_artifacts
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.engine.worker.service import Built, Service, built_on_all_ranks
from vllm_adainfer.errors import AdaInferError

logger = get_logger(__name__)


@dataclass(frozen=True)
class Reload:
    """Artifacts of the engine switch that were read again, and can take their places.

    Attributes:
        built: their policies, by name.
        lines: one for each policy.

    """

    built: Built
    lines: list[str]

    @classmethod
    def read(
        cls, model: Any, vllm_config: VllmConfig, digests: Mapping[str, str] | None = None
    ) -> Reload:
        """Read them; all ranks must call this.

        Args:
            model: an `EarlyExit`.
            vllm_config: of the engine.
            digests: those that the artifacts' files must have, by policy.

        Raises:
            AdaInferError: an artifact cannot be served without a restart, or ranks differ.

        """
        settings = model.settings

        def read() -> dict[str, Artifact]:
            if settings.artifact is None:
                raise AdaInferError("this engine has no artifact to read again")
            artifacts = load_artifacts(settings.artifacts)
            for name, artifact in artifacts.items():
                if digests is not None and artifact.digest != digests[name]:
                    raise AdaInferError(
                        f"artifact {settings.artifacts[name]!r} was overwritten while it was read "
                        "again, or differs from replica to replica: reload again"
                    )
                artifact.config.check_weights(model.fingerprint)
                cuts = model.loop.policies.exit_points
                check_replaces(name, artifact.config, model.artifacts[name].config, cuts)
            return artifacts

        built = built_on_all_ranks(model, vllm_config, read)
        return cls(
            built,
            [
                f"policy {name} was read again from {source}"
                for name, source in settings.artifacts.items()
            ],
        )

    def use(self, model: Any, running: RunningRequests, vllm_config: VllmConfig) -> list[str]:
        """Decide by them from the next step on; policies that came with adapters stay.

        Returns:
            a line for each policy.

        """
        Service.having(model, vllm_config, self.built).use(model, running)
        for line in self.lines:
            logger.info("%s", line)
        return self.lines


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
