"""Reload recalibrated artifacts without a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.source import Pinned
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.engine.worker.service import Built, Service, built_on_all_ranks
from vllm_adainfer.errors import AdaInferError

logger = get_logger(__name__)


@dataclass(frozen=True)
class Reload:
    """The artifacts of the engine switch, read again and checked, ready to be put in use.

    Attributes:
        built: the new policies, by name.
        lines: one log line for each policy.

    """

    built: Built
    lines: list[str]

    @classmethod
    def read(
        cls, model: Any, vllm_config: VllmConfig, pinned: Mapping[str, Pinned] | None = None
    ) -> Reload:
        """Read the artifacts again. A collective: every rank must call it.

        Args:
            model: an `EarlyExit`.
            vllm_config: the engine's config.
            pinned: by policy, where its artifact lies and the digest its files must have, so that
                nothing is asked of the hub; None for whatever there is now.

        Raises:
            AdaInferError: an artifact cannot be served without a restart, or ranks differ.

        """
        settings = model.settings

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
                model.check_calibrated(artifact.config)
                cuts = model.loop.policies.exit_points
                check_replaces(name, artifact.config, model.artifacts[name].config, cuts)
            return artifacts

        built = built_on_all_ranks(model, vllm_config, read)
        return cls(
            built,
            [
                f"policy {name} was reloaded from {source}"
                for name, source in settings.artifacts.items()
            ],
        )

    def use(self, model: Any, running: RunningRequests, vllm_config: VllmConfig) -> list[str]:
        """Decide with the new policies from the next step on; policies of adapters stay.

        Returns:
            one line for each policy.

        """
        Service.with_policies(model, vllm_config, self.built).use(model, running)
        for line in self.lines:
            logger.info("%s", line)
        return self.lines


def check_replaces(
    name: str, new: ArtifactConfig, old: ArtifactConfig, cuts: tuple[int, ...]
) -> None:
    """Check that a running engine can serve `new` in place of `old`.

    The stack stays cut after `cuts`, and the scheduler keeps the rule by which requests may exit.

    Raises:
        AdaInferError: it cannot: the sentence says what differs.

    """
    model = "architecture", "layers", "hidden_size", "vocab_size", "head_size", "score_head"
    for field in model:
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
    if not set(new.all_exit_points) <= set(cuts):
        raise AdaInferError(
            f"policy {name} has exit points {list(new.all_exit_points)}, this engine only "
            f"{list(cuts)}: restart it, or calibrate with --exit-points {','.join(map(str, cuts))}"
        )
    reads = [None if one.student is None else (one.student.reads, one.shared) for one in (new, old)]
    if new.student is not None and reads[0] != reads[1]:
        raise AdaInferError(
            f"policy {name} has a student that reads requests in another way than before: restart "
            "the engine"
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
            f"policy {name} bounds {new.risk}, the one before {old.risk}: the two policies "
            "admit different requests: restart the engine"
        )
    if set(new.never_early) != set(old.never_early):
        raise AdaInferError(
            f"policy {name} keeps other labels from being early answers than the one before: "
            "restart the engine"
        )
    if set(new.gates) != set(old.gates):
        raise AdaInferError(f"policy {name} has other gates than before: restart the engine")
    if new.top_k != old.top_k:
        raise AdaInferError(
            f"policy {name} promises other first documents than before: restart the engine"
        )
    if new.label_mass != old.label_mass:
        certified = ("does not certify", "certifies")[new.label_mass]
        raise AdaInferError(
            f"policy {name} {certified} the label mass, unlike the one before: restart the engine"
        )
