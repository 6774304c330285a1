"""An adapter's fingerprint is that of the files that vLLM has loaded; no step reads files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from tests.adapters import PROJECTIONS, save_adapter
from vllm_adainfer.artifact.fingerprints import adapter_fingerprint
from vllm_adainfer.engine.runner import adapters as ours
from vllm_adainfer.engine.runner import ranks
from vllm_adainfer.engine.runner.adapters import LoadedAdapters, StepAdapters

CAPACITY = 2  # adapters in memory: a third takes the place of the one used least lately


class InMemory(LRUCacheLoRAModelManager):
    """vLLM's, of a model without layers."""

    def __init__(self, config: LoRAConfig) -> None:
        self.model = SimpleNamespace()
        self.supported_lora_modules = list(PROJECTIONS)
        self.packed_modules_mapping, self.packed_modules, self.modules = {}, {}, {}
        self.lora_config, self.moe_ep_load_spec = config, None
        self._enable_mixed_moe_lora_format, self._pooling_task = False, None
        self._registered_adapters = AdapterLRUCache(CAPACITY, self.deactivate_adapter)
        self._active_adapters = AdapterLRUCache(CAPACITY, self._deactivate_adapter)
        self.lora_index_to_id = [None] * CAPACITY

    def set_adapter_mapping(self, mapping: Any) -> None:
        """There are no layers to tell."""


class Manager(LRUCacheWorkerLoRAManager):
    """vLLM's, which counts how often it has read an adapter's files."""

    def __init__(self) -> None:
        self.lora_config = LoRAConfig(max_loras=CAPACITY, max_lora_rank=8)
        self.lora_config.lora_dtype = torch.float32
        self._adapter_manager = InMemory(self.lora_config)
        self._lora_model_cls, self.vocab_size = LoRAModel, 1000
        self.max_position_embeddings = None
        self.reads = 0

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        self.reads += 1
        return super()._load_adapter(lora_request)


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def loaded(manager) -> LoadedAdapters:
    loaded = LoadedAdapters()
    loaded.watch(manager)
    return loaded


@pytest.fixture
def saved(reference, tmp_path) -> list[Path]:
    return [save_adapter(reference, tmp_path / str(seed), seed) for seed in range(CAPACITY + 1)]


@pytest.fixture
def adapters(saved) -> list[LoRARequest]:
    return [LoRARequest(f"a{i}", i + 1, str(path)) for i, path in enumerate(saved)]


@pytest.fixture
def no_files(monkeypatch) -> Any:
    """From the call on, reading files is an error."""

    def forbid() -> None:
        monkeypatch.setattr(ours, "fingerprint_of", None)

    return forbid


def overwrite(directory: Path) -> None:
    """Other weights in the place of an adapter's."""
    path = directory / "adapter_model.safetensors"
    save_file({name: 2 * one for name, one in load_file(path).items()}, path)


def step(manager: Manager, *adapters: LoRARequest) -> None:
    """VLLM's call at the beginning of a step."""
    manager.set_active_adapters(set(adapters), None)


@pytest.mark.parametrize("way", ["an RPC", "a step"])
def test_a_fingerprint_is_of_the_files_that_were_loaded_whatever_lies_there_now(
    manager, loaded, adapters, saved, way, no_files
):
    first, *_ = adapters
    expected = adapter_fingerprint(saved[0])
    {"an RPC": manager.add_adapter, "a step": lambda one: step(manager, one)}[way](first)
    overwrite(saved[0])
    assert adapter_fingerprint(saved[0]) != expected
    no_files()
    for _ in range(3):
        step(manager, first)
        assert loaded.fingerprint_of(first) == expected


def test_loading_in_place_brings_the_fingerprint_of_the_new_files(manager, loaded, adapters, saved):
    first, *_ = adapters
    manager.add_adapter(first)
    assert loaded.take_changed()
    overwrite(saved[0])
    manager.add_adapter(LoRARequest("a0", 1, str(saved[0]), load_inplace=True))
    assert loaded.fingerprint_of(first) == adapter_fingerprint(saved[0])
    assert loaded.take_changed()
    assert not loaded.take_changed()


@pytest.mark.parametrize("how", ["by another", "by name", "all"])
def test_an_adapter_that_has_left_memory_is_fingerprinted_again_when_it_comes_back(
    manager, loaded, adapters, saved, how
):
    first, second, third = adapters
    manager.add_adapter(first)
    if how == "by another":
        step(manager, second)
        step(manager, third)
    elif how == "by name":
        manager.remove_adapter(first.lora_int_id)
    else:
        manager.remove_all_adapters()
    overwrite(saved[0])
    loaded.take_changed()
    if how != "by another":  # a request was told before it is loaded, else it returns
        assert loaded.fingerprint_of(first) == adapter_fingerprint(saved[0])
    step(manager, first)
    assert loaded.take_changed() == (how == "by another")
    assert loaded.fingerprint_of(first) == adapter_fingerprint(saved[0])


@pytest.mark.parametrize("changes", [False, True])
def test_the_load_confirms_what_a_request_was_told_just_before(
    manager, loaded, adapters, saved, changes, monkeypatch
):
    first, *_ = adapters
    told, calls, find = loaded.fingerprint_of(first), [], ours.fingerprint_of
    monkeypatch.setattr(ours, "fingerprint_of", lambda path: calls.append(path) or find(path))
    assert (loaded.fingerprint_of(first), calls) == (told, [])
    if changes:
        overwrite(saved[0])
    step(manager, first)
    assert loaded.take_changed() == changes
    assert (loaded.fingerprint_of(first) == told) != changes


def test_an_adapter_overwritten_while_it_is_loaded_has_no_fingerprint(
    manager, loaded, adapters, saved, monkeypatch
):
    first, *_ = adapters
    read = LoRAModel.from_local_checkpoint
    monkeypatch.setattr(
        LoRAModel,
        "from_local_checkpoint",
        lambda *args, **kw: (read(*args, **kw), overwrite(saved[0]))[0],
    )
    manager.add_adapter(first)
    assert loaded.fingerprint_of(first) is None


def test_an_adapter_that_cannot_be_loaded_in_place_leaves_the_one_before(
    manager, loaded, adapters, saved, tmp_path
):
    first, *_ = adapters
    manager.add_adapter(first)
    expected = adapter_fingerprint(saved[0])
    with pytest.raises(Exception, match="a0"):
        manager.add_adapter(LoRARequest("a0", 1, str(tmp_path / "none"), load_inplace=True))
    assert loaded.fingerprint_of(first) == expected


def test_where_ranks_have_loaded_different_files_none_has_a_fingerprint(
    manager, loaded, adapters, monkeypatch
):
    first, *_ = adapters
    manager.add_adapter(first)

    def gather(numbers: list[int], own: int, group: str) -> None:
        numbers[:] = [own, own + 1]

    monkeypatch.setattr(
        ranks, "get_tp_group", lambda: SimpleNamespace(world_size=2, cpu_group="both")
    )
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert not loaded.agree(first)
    assert loaded.fingerprint_of(first) is None


def test_dummy_adapters_of_the_warm_up_have_no_fingerprint(manager, loaded):
    dummy = LoRARequest("warmup_1", 1, "/not/a/real/path")
    manager._adapter_manager._registered_adapters[1] = LoRAModel(1, 8, {})
    assert loaded.fingerprint_of(dummy) is None


def test_an_adapter_to_be_loaded_in_place_is_not_read_again_for_the_segments_of_a_step(
    manager, loaded, saved
):
    in_place = LoRARequest("a0", 1, str(saved[0]), load_inplace=True)
    step(manager, in_place)
    ours_of_step = StepAdapters(manager, [in_place, None])
    for _ in range(6):
        ours_of_step.use((1, 1, 0), (1, 0))
    assert manager.reads == 1
    assert in_place.load_inplace
