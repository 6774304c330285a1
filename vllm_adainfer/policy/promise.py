"""What a policy for probabilities promises, in words."""

from __future__ import annotations

from vllm_adainfer.policy.artifact import ArtifactConfig


def wrong_in_words(config: ArtifactConfig) -> str:
    """Which answers of a policy for probabilities count as wrong."""
    assert config.tolerance is not None
    where = " (among the labels or in the whole vocabulary)" if config.label_mass else ""
    return (
        f"another best label than full depth's, or a label's probability{where} that moves by more "
        f"than {config.tolerance:g}"
    )
