"""All processes of an engine start with the artifacts that it was configured for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.config.utils import replace

from tests.plugin.test_config_time import engine_config
from tests.tiny import tiny_artifact, tiny_config
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.pinned_artifacts import pin_artifacts, served_artifacts, served_configs
from vllm_adainfer.engine.scheduler.observers import observers_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.frontend.stat_logger import WithExitStats
from vllm_adainfer.settings.engine import Settings, read_settings

OVERWRITTEN = r"policy' was overwritten while the engine started: start it again"


class AnyBase:
    """In the place of vLLM's classes, of which only the constructor matters here."""

    def __init__(self, vllm_config: VllmConfig, *_: Any, **__: Any) -> None:
        self.vllm_config = vllm_config
        self.engine_indexes = [0]


class Model(EarlyExit, AnyBase):
    """The worker's model."""


class Logger(WithExitStats, AnyBase):
    """The frontend's statistics."""


def scheduler_of(vllm_config: VllmConfig) -> Any:
    """As much of vLLM's scheduler as observers are made with."""
    return SimpleNamespace(
        structured_output_manager=None,
        max_model_len=9,
        vllm_config=vllm_config,
        admission=Admission.from_config(vllm_config, settings_of(vllm_config)),
    )


READERS: dict[str, Callable[[VllmConfig], Any]] = {
    "model": lambda config: Model(vllm_config=config),
    "admission": lambda config: Admission.from_config(config, settings_of(config)),
    "metrics": Logger,
    "choices": lambda config: observers_of(config, settings_of(config), scheduler_of(config)),
}


def settings_of(vllm_config: VllmConfig) -> Settings:
    settings = read_settings(vllm_config.additional_config)
    assert settings is not None
    return settings


@pytest.fixture
def policy(tiny_model, tmp_path) -> Path:
    return tiny_artifact(tiny_model, tmp_path / "policy")


@pytest.fixture
def configured(tiny_model, policy) -> Any:
    return engine_config(tiny_model, {"artifact": str(policy)})


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", ["config", "tensors"])
def test_an_artifact_overwritten_while_the_engine_starts_is_served_by_no_process(
    tiny_model, policy, configured, reader, part
):
    """Scheduler and worker would have different labels, or thresholds."""
    READERS[reader](configured)
    changes = {"delta": 0.2} if part == "config" else {}
    other = tiny_artifact(tiny_model, policy.parent / "other", **changes)
    if part == "tensors":
        tensors = other / "policy.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    (policy / "config.json").write_bytes((other / "config.json").read_bytes())
    (policy / "policy.safetensors").write_bytes((other / "policy.safetensors").read_bytes())
    with pytest.raises(AdaInferError, match=OVERWRITTEN):
        READERS[reader](configured)


@pytest.mark.parametrize(
    "sent",
    [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config)), replace],
    ids=["copied", "copied deep", "to another process", "by vLLM's replace"],
)
def test_what_an_engine_was_configured_for_goes_with_its_config(
    tiny_model, policy, configured, sent
):
    found = sent(configured)
    assert list(served_configs(found, settings_of(found))) == ["default"]
    tiny_artifact(tiny_model, policy, delta=0.2)
    with pytest.raises(AdaInferError, match=OVERWRITTEN):
        served_artifacts(found, settings_of(found))


def test_artifacts_are_not_in_the_key_of_vllms_compile_cache(tiny_model, policy, configured):
    unpinned = copy.copy(configured)
    unpinned.additional_config = {"adainfer": {"artifact": str(policy)}}
    before = configured.compute_hash()
    assert before == unpinned.compute_hash()
    tiny_artifact(tiny_model, policy, delta=0.2)
    pin_artifacts(configured, settings_of(configured))
    assert configured.compute_hash() == before


def test_a_switch_serves_several_engines_one_after_the_other(tiny_model, policy):
    switch = {"artifact": str(policy)}
    first = engine_config(tiny_model, switch)
    tiny_artifact(tiny_model, policy, delta=0.2)
    second = engine_config(tiny_model, switch)
    assert served_configs(second, settings_of(second)) == {
        "default": tiny_config(tiny_model, delta=0.2)
    }
    with pytest.raises(AdaInferError, match=OVERWRITTEN):
        served_configs(first, settings_of(first))
