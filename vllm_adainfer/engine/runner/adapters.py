"""LoRA adapters: the files vLLM has loaded, and the adapter of each row of a step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.fingerprints import adapter_fingerprint
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.lora import (
    adapter_directory,
    loaded_adapter,
    on_adapter_load,
    use_adapters,
)
from vllm_adainfer.engine.runner.ranks import same_on_all_ranks
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.batch.layout import RowLayout

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = get_logger(__name__)

NO_ADAPTER = 0  # vLLM numbers adapters from 1 on
FINGERPRINT = "adainfer_fingerprint"  # an attribute that we set on vLLM's `LoRAModel`
UNKNOWN = ""  # unlike the fingerprint of any adapter


def fingerprint_of(path: str) -> str | None:
    """The fingerprint of the adapter at `path`, or hub id; None if there is no adapter."""
    try:
        return adapter_fingerprint(adapter_directory(path))
    except (AdaInferError, OSError):
        return None  # vLLM also fails to load it, and says why


@lru_cache
def changes_head(path: str, fingerprint: str | None) -> bool:
    """Whether the adapter at `path`, with this fingerprint, has weights for the LM head.

    True if that is not known.
    """
    try:
        config = json.loads((adapter_directory(path) / "adapter_config.json").read_text())
        return fingerprint is None or "lm_head" in config["target_modules"]
    except (AdaInferError, OSError, KeyError, TypeError, ValueError):
        return True


class LoadedAdapters:
    """The fingerprints of a worker's adapters, taken of the files when vLLM loads them.

    A step reads files only for an adapter that it is about to load; the load then confirms the
    fingerprint. `numbers` are vLLM's, of each adapter with a bundled policy, by name.
    """

    def __init__(self) -> None:
        """Start without adapters; see `watch`."""
        self.numbers: dict[str, int] = {}
        self._manager: Any = None
        self._expected: dict[int, str | None] = {}
        self._changed = False

    def watch(self, manager: Any) -> None:
        """Fingerprint all that vLLM's `LRUCacheWorkerLoRAManager` loads from now on."""
        self._manager = manager
        on_adapter_load(manager, self._load)

    def fingerprint_of(self, adapter: LoRARequest) -> str | None:
        """The fingerprint of an adapter that is loaded or that this step loads; None if unknown."""
        number = adapter.lora_int_id
        loaded = self._loaded(number)
        if loaded is not None:
            found: str | None = getattr(loaded, FINGERPRINT, None)
            return found
        if number not in self._expected:
            self._expected[number] = fingerprint_of(adapter.lora_path)
        return self._expected[number]

    def take_changed(self) -> bool:
        """Whether a load has contradicted an expected fingerprint since the last call."""
        changed, self._changed = self._changed, False
        return changed

    def agree(self, adapter: LoRARequest) -> bool:
        """Whether all ranks have loaded the same files; if not, the adapter has no fingerprint.

        A collective: every rank must call it.
        """
        loaded = self._loaded(adapter.lora_int_id)
        found = getattr(loaded, FINGERPRINT, None)
        same = same_on_all_ranks(0 if found is None else int(found[:15], 16) + 1)
        if not same and loaded is not None:
            setattr(loaded, FINGERPRINT, None)
            self._changed = True
        return same

    def _loaded(self, number: int) -> Any:
        return None if self._manager is None else loaded_adapter(self._manager, number)

    def _load(self, adapter: LoRARequest, load: Callable[[], Any]) -> Any:
        """Let vLLM load an adapter, and fingerprint the files it has read."""
        former = getattr(self._loaded(adapter.lora_int_id), FINGERPRINT, UNKNOWN)
        said = self._expected.pop(adapter.lora_int_id, former)
        found = fingerprint_of(adapter.lora_path)
        loaded = load()
        if fingerprint_of(adapter.lora_path) != found:
            found = None
            logger.warning(
                "requests with the adapter %s run at full depth: %s was overwritten while it was "
                "loaded: load it again",
                adapter.lora_name,
                adapter.lora_path,
            )
        setattr(loaded, FINGERPRINT, found)
        self._changed = self._changed or found != said
        return loaded


def _loaded_once(adapter: LoRARequest) -> LoRARequest:
    """`adapter` without ``load_inplace``, for which vLLM 0.32 loads it again in every step."""
    if not adapter.load_inplace:
        return adapter
    adapter = copy.copy(adapter)
    adapter.load_inplace = False
    return adapter


class StepAdapters:
    """The adapters of a step's requests, mapped to any of the step's rows."""

    def __init__(self, manager: Any, adapters: Sequence[LoRARequest | None]) -> None:
        """`manager` is the worker's `LRUCacheWorkerLoRAManager`; None stands for the base model."""
        self._manager = manager
        self._numbers = np.array([NO_ADAPTER if a is None else a.lora_int_id for a in adapters])
        # They are loaded by now; with ``load_inplace`` vLLM would load them again.
        self._active = {_loaded_once(adapter) for adapter in set(adapters) if adapter is not None}

    def of_rows(self, layout: RowLayout) -> Callable[[], None]:
        """What lets layers apply the adapters of the rows of `layout` to the rows they run next."""
        rows, requests = self._numbers[layout.row_requests], self._numbers[layout.present]
        return partial(self.use, tuple(rows.tolist()), tuple(requests.tolist()))

    def use_for_logits(self, requests: Ints) -> None:
        """Use the adapters of `requests` for the LM head's next rows, one row each."""
        numbers = tuple(self._numbers[requests].tolist())
        self.use(numbers, numbers)

    def use(self, rows: tuple[int, ...], requests: tuple[int, ...]) -> None:
        """Give vLLM's layers the adapter number of each row and of each request."""
        if rows:
            use_adapters(self._manager, self._active, rows, requests)
