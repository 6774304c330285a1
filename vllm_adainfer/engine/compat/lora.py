"""LoRA adapters in a worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def lora_manager_of(runner: Any) -> Any:
    """The adapter manager of a model runner; None where LoRA is off.

    Both of vLLM 0.32's runners keep it under the same name.
    """
    return getattr(runner, "lora_manager", None)


def adapter_directory(path: str) -> Path:
    """The directory that vLLM 0.32 loads an adapter from, by ``lora_path``, maybe a hub id.

    A FileNotFoundError if there is none.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    directory = Path(get_adapter_absolute_path(path))
    if not directory.is_dir():
        raise FileNotFoundError(path)
    return directory


def on_adapter_load(manager: Any, loading: Callable[[Any, Callable[[], Any]], Any]) -> None:
    """Call ``loading(request, load)`` wherever vLLM reads an adapter's files.

    vLLM 0.32 always reads them in ``WorkerLoRAManager._load_adapter``: for ``add_lora``, for a step
    whose adapters are not in memory, and for ``load_inplace``. `load` returns vLLM's `LoRAModel`.
    """
    load = manager._load_adapter
    manager._load_adapter = lambda request: loading(request, partial(load, request))


def loaded_adapter(manager: Any, number: int) -> Any:
    """The `LoRAModel` that vLLM 0.32 keeps in memory for a ``lora_int_id``; None without one.

    Unlike ``get_adapter``, this does not count as a use of the adapter.
    """
    return manager._adapter_manager.list_adapters().get(number)


def use_adapters(
    manager: Any, active: set[Any], rows: tuple[int, ...], requests: tuple[int, ...]
) -> None:
    """Map the adapters `active` to rows and to requests, by their ``lora_int_id``.

    vLLM 0.32's runners make this call for the rows of a step (`LoRAModelRunnerMixin`). The manager
    skips a mapping equal to the last one it was given, so changes must go through it.
    """
    from vllm.lora.layers import LoRAMapping

    manager.set_active_adapters(active, LoRAMapping(rows, requests, is_prefill=True))
