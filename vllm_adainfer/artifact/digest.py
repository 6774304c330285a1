"""Digests of artifacts, to compare what several processes have read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.artifact.source import SERVED_FILES, Stamps, stamps_of


def digest_of(artifacts: Mapping[str, Artifact]) -> int:
    """A number of 62 bits for the configs and tensors of artifacts, by the name of the policy."""
    digest = hashlib.sha256()
    for name, artifact in artifacts.items():
        digest.update(f"{name} {artifact.config.model_dump_json()}".encode())
        for part in sorted(artifact.tensors):
            raw = artifact.tensors[part].contiguous().view(torch.uint8)
            digest.update(part.encode() + raw.numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 2


def files_digest(directory: Path) -> str:
    """A SHA-256 of the files of an artifact that are served, in hexadecimal digits."""
    return _files_digest(directory, stamps_of(directory))


@lru_cache(256)
def _files_digest(directory: Path, _stamps: Stamps) -> str:
    """The stamps tell when to read the files again."""
    digest = hashlib.sha256()
    for name in SERVED_FILES:
        part = hashlib.sha256()
        with (directory / name).open("rb") as file:
            while block := file.read(1 << 20):
                part.update(block)
        digest.update(part.digest())
    return digest.hexdigest()
