"""What an engine decides by changes on every rank, or on none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import tiny_config, tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact, digest_of
from vllm_adainfer.engine.runner import ranks
from vllm_adainfer.engine.worker import served_policies
from vllm_adainfer.engine.worker.served_policies import ServedPolicies
from vllm_adainfer.errors import AdaInferError


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """What this rank has told the other one, which has read nothing."""
    told: list[int] = []

    def gather(numbers: list[int], own: int, group: str) -> None:
        told.append(own)
        numbers[:] = [own, 0]

    both = SimpleNamespace(world_size=2, cpu_group="both")
    monkeypatch.setattr(ranks, "get_tp_group", lambda: both)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(ServedPolicies, "check", lambda *_: None)
    monkeypatch.setattr(ServedPolicies, "_composed", lambda *_: None)
    return told


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")


def served() -> ServedPolicies:
    model = SimpleNamespace(device=torch.device("cpu"), logit_lens=None, artifacts={})
    running: Any = SimpleNamespace()
    return ServedPolicies(model, None, running)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["reads", "checks", "builds", "composes"])
def test_a_rank_that_fails_does_not_let_the_others_wait(asked, monkeypatch, tiny_model, where):
    config = tiny_config(tiny_model)
    artifacts = {"a": Artifact(config, tiny_tensors(config))}
    if where == "checks":
        monkeypatch.setattr(ServedPolicies, "check", out_of_memory)
    if where == "builds":
        monkeypatch.setattr(served_policies, "policies_of_artifacts", out_of_memory)
    if where == "composes":
        monkeypatch.setattr(ServedPolicies, "_composed", out_of_memory)
    read = out_of_memory if where == "reads" else lambda: artifacts
    with pytest.raises(torch.OutOfMemoryError):
        served().build_on_all_ranks(read)
    assert asked == [0]


def test_a_rank_goes_on_only_with_what_the_others_have_built(asked, tiny_model):
    config = tiny_config(tiny_model)
    artifacts = {"a": Artifact(config, tiny_tensors(config))}
    with pytest.raises(AdaInferError, match="ranks read different artifacts"):
        served().build_on_all_ranks(lambda: artifacts)
    assert asked == [digest_of(artifacts)]
    assert asked != [0]
