"""The LoRA adapter that a policy is calibrated or measured with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Adapter
from vllm_adainfer.artifact.fingerprints import ADAPTER_CONFIG, adapter_fingerprint
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter as ``--lora NAME=DIR`` gives it, and the rank of its matrices."""

    name: str
    directory: Path
    rank: int

    @property
    def described(self) -> Adapter:
        """The adapter as an artifact names it."""
        return Adapter(name=self.name, fingerprint=adapter_fingerprint(self.directory))

    @property
    def engine_settings(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM`."""
        served = min(rank for rank in _ranks() if rank >= self.rank)
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": served}

    @property
    def request(self) -> LoRARequest:
        """The argument of `LLM.generate`."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.name, 1, str(self.directory.absolute()))


def read_adapter(text: str) -> NamedAdapter | None:
    """The adapter of ``--lora``, if any.

    An AdaInferError if it is not NAME=DIR with an adapter that policies can be for.
    """
    if not text:
        return None
    name, _, place = text.partition("=")
    directory = Path(place)
    if not name or not place:
        raise AdaInferError(f"--lora {text}: give the name of requests and a directory, NAME=DIR")
    adapter_fingerprint(directory)
    settings = json.loads((directory / ADAPTER_CONFIG).read_text())
    rank, modules = settings.get("r"), settings.get("target_modules") or ()
    if not isinstance(rank, int) or not 0 < rank <= max(_ranks()):
        raise AdaInferError(
            f"{directory / ADAPTER_CONFIG}: r = {rank!r} is not a rank that vLLM serves"
        )
    if "lm_head" in modules or "lm_head" in (settings.get("modules_to_save") or ()):
        raise AdaInferError(
            f"the adapter {name} changes lm_head, and probes read the base model's: merge the "
            "adapter into the weights, and calibrate for those"
        )
    return NamedAdapter(name, directory, rank)


def _ranks() -> tuple[int, ...]:
    """The maximum ranks that vLLM can be configured for."""
    from vllm.config.lora import MaxLoRARanks

    return get_args(MaxLoRARanks)


def adapter_for(config: ArtifactConfig, adapter: NamedAdapter | None) -> NamedAdapter | None:
    """The `adapter`, or an AdaInferError if an artifact was calibrated with another one."""
    found = None if adapter is None else adapter.described
    if config.adapter == found:
        return adapter
    if config.adapter is None:
        raise AdaInferError("the artifact was calibrated for the base model: drop --lora")
    wanted = f"--lora {config.adapter.name}=DIR"
    if found is None or found.name != config.adapter.name:
        raise AdaInferError(f"the artifact was calibrated with a LoRA adapter: give {wanted}")
    raise AdaInferError(
        f"the artifact was calibrated with another adapter {found.name}: its fingerprint is "
        f"{config.adapter.fingerprint}, that of DIR is {found.fingerprint}: give the right one, or "
        "calibrate with this one"
    )
