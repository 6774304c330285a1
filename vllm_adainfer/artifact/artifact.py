"""A loaded artifact, and the parts of several."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Encoder:
    """The encoder of a student, as transformers saves one.

    Attributes:
        settings: the content of its ``config.json``.
        tensors: its weights, by name.
        largest_token: the largest token id that a text may have.

    """

    settings: Mapping[str, Any]
    tensors: dict[str, Tensor]
    largest_token: int = 0


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact.

    Attributes:
        config: the content of ``config.json``.
        tensors: the content of ``policy.safetensors``, by name.
        digest: SHA-256 of the files that are served, in hexadecimal; empty if the artifact was
            made in memory.
        encoder: that of the student; None without a student.

    """

    config: ArtifactConfig
    tensors: dict[str, Tensor]
    digest: str = ""
    encoder: Encoder | None = None

    def parts(self, name: str) -> dict[str, Artifact]:
        """The policies of this artifact, each on its own, by name; see `ArtifactConfig.parts`."""
        return {
            part: replace(self, config=config, tensors=tensors_of_part(self.tensors, part != name))
            for part, config in self.config.parts(name).items()
        }


def tensors_of_part(tensors: Mapping[str, T], last_token: bool) -> dict[str, T]:
    """The tensors of one of an artifact's parts, by their names in an artifact of its own."""
    prefix = f"{LAST_TOKEN}."
    if last_token:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


W = TypeVar("W", Artifact, ArtifactConfig)


def all_parts(wholes: Mapping[str, W]) -> dict[str, W]:
    """The parts of several artifacts, or of their configs, by name."""
    return {part: one for name, whole in wholes.items() for part, one in whole.parts(name).items()}


def digests_of(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """The digest of each artifact's files, by the names of its parts."""
    return {part: one.digest for name, one in artifacts.items() for part in one.config.parts(name)}


def digest_of(artifacts: Mapping[str, Artifact]) -> int:
    """A 62-bit digest of artifacts by policy, to compare what several ranks have read."""
    text = "".join(f"{name} {artifact.digest}\n" for name, artifact in artifacts.items())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
