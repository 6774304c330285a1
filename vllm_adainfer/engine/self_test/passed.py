"""Remember that a device has passed the self-test, beside vLLM's own caches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import envs

import vllm_adainfer
from vllm_adainfer.artifact.artifact import digest_of
from vllm_adainfer.files import PUBLIC, replace_file


@dataclass(frozen=True)
class Passed:
    """A configuration, and the file that records that it has passed.

    Attributes:
        tested: device, versions, model and artifacts.

    """

    tested: dict[str, Any]

    @classmethod
    def of(cls, runner: Any) -> Passed:
        """The configuration that a Model Runner V2 is about to serve."""
        model, config = runner.model, runner.vllm_config
        return cls(
            {
                "device": torch.cuda.get_device_name(runner.device),
                "cuda": torch.version.cuda,
                "torch": torch.__version__,
                "vllm": vllm.__version__,
                "vllm_adainfer": vllm_adainfer.__version__,
                "model": type(model).__name__,
                "weights": model.fingerprint,
                "artifacts": digest_of(model.artifacts),
                "attention": sorted(
                    {group.backend.get_name() for some in runner.attn_groups for group in some}
                ),
                "config": config.compute_hash(),
                "ranks": config.parallel_config.world_size,
            }
        )

    @property
    def path(self) -> Path:
        """The file; its name is a digest of what was tested."""
        text = json.dumps(self.tested, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Path(envs.VLLM_CACHE_ROOT) / "adainfer" / "self_test" / f"{name}.json"

    @property
    def exists(self) -> bool:
        """Whether all of this has passed before."""
        return self.path.exists()

    def remember(self) -> None:
        """Note that it has passed. A failure is not remembered: it is tested again each time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps(self.tested, indent=1, sort_keys=True), PUBLIC)
