"""A number for all that artifacts say, to compare what several processes have read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from vllm_adainfer.policy.artifact import Artifact


def digest_of(artifacts: Mapping[str, Artifact]) -> int:
    """A number of 62 bits for the configs and tensors of artifacts, by the name of the policy."""
    digest = hashlib.sha256()
    for name, artifact in artifacts.items():
        digest.update(f"{name} {artifact.config.model_dump_json()}".encode())
        for part in sorted(artifact.tensors):
            raw = artifact.tensors[part].contiguous().view(torch.uint8)
            digest.update(part.encode() + raw.numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 2
