"""Remember that a device has passed the self-test, beside vLLM's own caches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import envs

import vllm_adainfer
from vllm_adainfer.artifact.artifact import digest_of
from vllm_adainfer.files import PUBLIC, replace_file


def configuration_of(runner: Any) -> dict[str, Any]:
    """What a Model Runner V2 is about to serve: device, versions, model and artifacts."""
    model, config = runner.model, runner.vllm_config
    return {
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


def record_of(tested: dict[str, Any]) -> Path:
    """The file that is there if all of this has passed; its name is a digest of it."""
    text = json.dumps(tested, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "adainfer" / "self_test" / f"{name}.json"


def remember(tested: dict[str, Any]) -> None:
    """Note that it has passed. A failure is not remembered: it is tested again each time."""
    path = record_of(tested)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(tested, indent=1, sort_keys=True), PUBLIC)
