"""LoRA adapters: which files vLLM has loaded, and which adapter each row of a step has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
FINGERPRINT = "adainfer_fingerprint"  # an attribute of vLLM's `LoRAModel`, which goes with it
UNKNOWN = ""  # the fingerprint of no adapter


def fingerprint_of(path: str) -> str | None:
    """The fingerprint of the adapter that vLLM loads from `path` or hub id; None if it is none."""
    try:
        return adapter_fingerprint(adapter_directory(path))
    except (AdaInferError, OSError):
        return None  # vLLM fails to load it, too, and says why


class LoadedAdapters:
    """The fingerprints of a worker's adapters: each is that of the files that vLLM has loaded.

    A step that asks for one reads no file. Only of an adapter that the step is about to load, the
    files are read beforehand, and the load then confirms what was found.

    Attributes:
        numbers: of the adapters whose policies came with them, by name.

    """

    def __init__(self) -> None:
        """Of a worker without adapters, until `watch` is called."""
        self.numbers: dict[str, int] = {}
        self._manager: Any = None
        self._expected: dict[int, str | None] = {}
        self._changed = False

    def watch(self, manager: Any) -> None:
        """Fingerprint what vLLM's `LRUCacheWorkerLoRAManager` loads from now on."""
        self._manager = manager
        on_adapter_load(manager, self._load)

    def fingerprint_of(self, adapter: LoRARequest) -> str | None:
        """That of an adapter which is loaded, or which this step loads; None if it has none."""
        number = adapter.lora_int_id
        loaded = self._loaded(number)
        if loaded is not None:
            found: str | None = getattr(loaded, FINGERPRINT, None)
            return found
        if number not in self._expected:
            self._expected[number] = fingerprint_of(adapter.lora_path)
        return self._expected[number]

    def take_changed(self) -> bool:
        """Whether an adapter has another fingerprint than was said of it, since the last call."""
        changed, self._changed = self._changed, False
        return changed

    def agree(self, adapter: LoRARequest) -> bool:
        """Whether all ranks, which must call this, have loaded the same files as an adapter.

        Otherwise none of them knows its fingerprint.
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
        """Let vLLM read an adapter's files, and note which these were."""
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
    """The same adapter, which 0.32 does not load again because it is to be loaded in place."""
    if not adapter.load_inplace:
        return adapter
    adapter = copy.copy(adapter)
    adapter.load_inplace = False
    return adapter


class StepAdapters:
    """The adapters of a step's requests.

    vLLM maps adapters to the rows that a step comes with; here, to those that are left of them.
    """

    def __init__(self, manager: Any, adapters: Sequence[LoRARequest | None]) -> None:
        """Prepare to map rows.

        Args:
            manager: the worker's, vLLM's `LRUCacheWorkerLoRAManager`.
            adapters: that of each request of the step; None for the base model.

        """
        self._manager = manager
        self._numbers = np.array([NO_ADAPTER if a is None else a.lora_int_id for a in adapters])
        # This step's adapters are loaded: vLLM would load those again that are to be in place.
        self._active = {_loaded_once(adapter) for adapter in set(adapters) if adapter is not None}

    def of_rows(self, layout: RowLayout) -> RowAdapters:
        """For the layers, over the rows of `layout`."""
        rows, requests = self._numbers[layout.row_requests], self._numbers[layout.present]
        return RowAdapters(self, tuple(rows.tolist()), tuple(requests.tolist()))

    def use_for_logits(self, requests: Ints) -> None:
        """Let the LM head take the next rows for those of `requests`, one each."""
        numbers = tuple(self._numbers[requests].tolist())
        self.use(numbers, numbers)

    def use(self, rows: tuple[int, ...], requests: tuple[int, ...]) -> None:
        """Tell vLLM's layers the number of the adapter of each row, and of each request."""
        if rows:
            use_adapters(self._manager, self._active, rows, requests)


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of a batch's rows.

    Attributes:
        step: of all its requests.
        rows: [rows], the numbers of their adapters.
        requests: [requests], the same for those that have rows.

    """

    step: StepAdapters
    rows: tuple[int, ...]
    requests: tuple[int, ...]

    def use(self) -> None:
        """Let the layers apply them to the rows that they run next."""
        self.step.use(self.rows, self.requests)
