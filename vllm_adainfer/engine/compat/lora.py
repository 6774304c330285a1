"""LoRA adapters in a worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def lora_manager_of(runner: Any) -> Any:
    """The manager of adapters of a model runner (0.32: of both), None where LoRA is off."""
    return getattr(runner, "lora_manager", None)


def adapter_directory(path: str) -> Path:
    """Where 0.32 loads an adapter from, by its ``lora_path``, which may be a hub id.

    Raises:
        FileNotFoundError: there is no such directory.

    """
    from vllm.lora.utils import get_adapter_absolute_path

    directory = Path(get_adapter_absolute_path(path))
    if not directory.is_dir():
        raise FileNotFoundError(path)
    return directory


def on_adapter_load(manager: Any, loading: Callable[[Any, Callable[[], Any]], Any]) -> None:
    """Let ``loading(request, load)`` take the place of each time an adapter's files are read.

    In 0.32 all ways there lead through ``WorkerLoRAManager._load_adapter``: ``add_lora``, a step
    whose adapters are not in memory, and ``load_inplace``. `load` returns vLLM's `LoRAModel`.
    """
    load = manager._load_adapter
    manager._load_adapter = lambda request: loading(request, partial(load, request))


def loaded_adapter(manager: Any, number: int) -> Any:
    """The `LoRAModel` that 0.32 keeps in memory for a ``lora_int_id``; None without one.

    ``get_adapter`` would make it the one used last.
    """
    return manager._adapter_manager.list_adapters().get(number)


def use_adapters(
    manager: Any, active: set[Any], rows: tuple[int, ...], requests: tuple[int, ...]
) -> None:
    """Map the adapters `active` to rows and to requests, by their numbers.

    0.32's runners make this call for the rows of a step (`LoRAModelRunnerMixin`). The manager
    remembers the last mapping, and takes no other way to change it: the next step with the same
    rows would keep what it does not know of.
    """
    from vllm.lora.layers import LoRAMapping

    manager.set_active_adapters(active, LoRAMapping(rows, requests, is_prefill=True))
