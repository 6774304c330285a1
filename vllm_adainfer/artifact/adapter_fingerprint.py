"""Which LoRA adapter a policy was calibrated with: a fingerprint of its files."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from vllm_adainfer.errors import AdaInferError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")  # as vLLM looks
# What changes the update that vLLM makes of the weights.
KEYS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def adapter_fingerprint(directory: Path) -> str:
    """A digest of an adapter's weights and of how they are scaled.

    Raises:
        AdaInferError: the directory holds no adapter.

    """
    config, weights = directory / CONFIG, _weights_of(directory)
    return _digest(config, config.stat().st_mtime_ns, weights, weights.stat().st_mtime_ns)


def _weights_of(directory: Path) -> Path:
    found = [directory / name for name in WEIGHTS if (directory / name).is_file()]
    if not found or not (directory / CONFIG).is_file():
        raise AdaInferError(
            f"{directory} is not a LoRA adapter: it needs {CONFIG} and {WEIGHTS[0]}, as peft "
            "saves them"
        )
    return found[0]


@lru_cache(256)
def _digest(config: Path, _config_time: int, weights: Path, _weights_time: int) -> str:
    """The times tell when to read a file again."""
    try:
        settings = json.loads(config.read_text())
        scales = json.dumps([settings.get(key) for key in KEYS], sort_keys=True)
    except (ValueError, AttributeError) as error:
        raise AdaInferError(f"{config} is not the config of a LoRA adapter: {error}") from None
    digest = hashlib.sha256(scales.encode())
    with weights.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
