"""Fingerprints of what a policy belongs to: the model's weights, and a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_adainfer.artifact.source import add_file
from vllm_adainfer.errors import AdaInferError

ADAPTER_CONFIG = "adapter_config.json"
# In the order in which vLLM looks for them.
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
# The settings that change what vLLM adds to the model's weights.
SCALES = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


class WeightsFingerprint:
    """A short hash of up to 1,024 evenly spaced elements of every tensor in a checkpoint.

    It covers the checkpoint, not the served parameters, which are stacked and sharded over ranks.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is the dtype the model is served in."""
        self._dtype = dtype
        self._samples: dict[str, bytes] = {}

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield `weights`, (name, tensor), unchanged, and sample them on their way to the model."""
        for name, tensor in weights:
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].to("cpu", torch.float32)
            self._samples[name] = str(tensor.dtype).encode() + sample.numpy().tobytes()
            yield name, tensor

    @property
    def names(self) -> set[str]:
        """Names of the tensors sampled so far."""
        return set(self._samples)

    def unlike(self, other: WeightsFingerprint) -> set[str]:
        """Names of the sampled tensors that `other` lacks or has with other values."""
        return {n for n, sample in self._samples.items() if other._samples.get(n) != sample}

    @property
    def hexdigest(self) -> str:
        """16 hex digits over the tensors sampled so far; their order does not matter."""
        digest = hashlib.sha256(str(self._dtype).encode())
        for name in sorted(self._samples):
            digest.update(name.encode() + self._samples[name])
        return digest.hexdigest()[:16]


def adapter_fingerprint(directory: Path) -> str:
    """SHA-256, in hex digits, of an adapter's weights and of the settings that scale them.

    An AdaInferError if the directory holds no adapter.
    """
    config = directory / ADAPTER_CONFIG
    weights = next((directory / n for n in ADAPTER_WEIGHTS if (directory / n).is_file()), None)
    if weights is None or not config.is_file():
        raise AdaInferError(
            f"{directory} is not a LoRA adapter: it needs {ADAPTER_CONFIG} and "
            f"{ADAPTER_WEIGHTS[0]}, as peft saves them"
        )
    return _adapter_digest(config, config.stat().st_mtime_ns, weights, weights.stat().st_mtime_ns)


@lru_cache(256)  # by modification time: vLLM's load of an adapter asks three times
def _adapter_digest(config: Path, _config_time: int, weights: Path, _weights_time: int) -> str:
    try:
        settings = json.loads(config.read_text())
        scales = json.dumps([settings.get(key) for key in SCALES], sort_keys=True)
    except (ValueError, AttributeError) as error:
        raise AdaInferError(f"{config} is not the config of a LoRA adapter: {error}") from None
    digest = hashlib.sha256(scales.encode())
    add_file(digest, weights)
    return digest.hexdigest()
