"""What an engine makes of the two parts of a pooled policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.admitted import admitted
from tests.running import new_request, running_requests, step_of_one
from tests.tiny import LAYERS, tiny_config, tiny_tensors
from tests.unit.test_pooled_policy import ALONE, POOLED, POOLED_FROM, QUESTIONS, last_token, levels
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.running import NOT_POOLED
from vllm_adainfer.engine.worker.served_policies import (
    ServedPolicies,
    check_cuts,
    check_replaces,
)
from vllm_adainfer.engine.worker.warm_up import warm_up
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.settings.engine import Settings

CPU = torch.device("cpu")


@pytest.fixture
def pooled(tiny_model) -> ArtifactConfig:
    return tiny_config(tiny_model, **POOLED)


@pytest.mark.parametrize(("own_kv_layers", "refused"), [(4, True), (5, False), (LAYERS, False)])
def test_it_is_not_served_where_only_the_last_token_goes_on(pooled, own_kv_layers, refused):
    """Its part for the last token may lie there; so may other policies."""
    if refused:
        with pytest.raises(AdaInferError, match=r"after layer 4 .* \[0, 2, 5\] must not lie after"):
            pooled.check_rows_go_on(own_kv_layers)
    else:
        pooled.check_rows_go_on(own_kv_layers)
    pooled.parts("a")["a:last-token"].check_rows_go_on(1)


def test_no_reload_brings_one_that_is_not_served_there(pooled):
    model = SimpleNamespace(num_own_kv_layers=4, artifacts={}, check_calibrated=lambda _: None)
    served = ServedPolicies(model, None, SimpleNamespace())
    with pytest.raises(AdaInferError, match="only the last one goes on after layer 4"):
        served.check("a", pooled)


@pytest.mark.parametrize(("old", "new"), [(POOLED, ALONE), (ALONE, POOLED), ({}, POOLED)])
def test_a_reload_may_bring_or_drop_either_part(tiny_model, old, new):
    configs = [tiny_config(tiny_model, **own) for own in (new, old)]
    check_replaces("reviews", *configs)
    check_cuts("reviews", configs[0], (0, 2, 3, 5))


def test_a_reload_may_not_bring_exit_points_of_its_last_token_alone(tiny_model):
    new = tiny_config(tiny_model, **POOLED)
    with pytest.raises(AdaInferError, match=r"exit points \[0, 2, 3, 5\], this engine only \[0, "):
        check_cuts("reviews", new, (0, 2, 5))


def admission_of(tiny_model: Path, **changes: Any) -> tuple[Admission, SamplingParams]:
    """One policy before it, so that its rows are numbered on: 0 and 1 are the other's."""
    config = tiny_config(tiny_model, **{**POOLED, **changes})
    other = tiny_config(tiny_model, labels=config.labels)
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        allowed_token_ids=list(config.label_ids),
        extra_args={"adainfer_policy": "a"},
    )
    return Admission(Settings(artifact={"z": "", "a": ""}), {"z": other, "a": config}), params


@pytest.mark.parametrize("length", [1, POOLED_FROM, POOLED_FROM + 1])
@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0])
@pytest.mark.parametrize("of_last_token", ["both levels", "the looser level", "no part"])
def test_a_request_has_a_row_of_each_part_that_certifies_its_epsilon(
    tiny_model, length, epsilon, of_last_token
):
    """A prompt that has no token of its own is decided by its last token alone."""
    own = {"both levels": last_token(), "the looser level": last_token(levels=levels(0.05))}
    admission, params = admission_of(tiny_model, last_token=own.get(of_last_token))
    params.extra_args["adainfer_epsilon"] = epsilon
    found = admitted(admission, params, [5] * length)
    whole = {0.02: 2, 0.05: 3, 0: FULL_DEPTH}[epsilon]
    rows = {"both levels": {0.02: 4, 0.05: 5}, "the looser level": {0.05: 4}, "no part": {}}
    last = rows[of_last_token].get(epsilon, FULL_DEPTH)
    has_own = length > POOLED_FROM
    assert found.last_token_row == last
    assert found.threshold_row == (whole if has_own else last)
    assert found.pooled_from == (POOLED_FROM if has_own else NOT_POOLED)


@pytest.mark.parametrize(
    ("end", "rows"),
    [((20, 30), (3, 6)), ((30, 31), (5, FULL_DEPTH)), ((1, 2), (FULL_DEPTH, FULL_DEPTH))],
    ids=["certified by both", "certified by one", "unknown"],
)
def test_each_part_certifies_questions_of_its_own(tiny_model, end, rows):
    """Rows of the policy before: 0 and 1; of two questions: 2 to 5; of the one: 6 and 7."""
    admission, params = admission_of(
        tiny_model,
        by_question=True,
        questions=QUESTIONS,
        last_token=last_token(certified={"mood": (0.02,)}),
    )
    for epsilon, row in ((0.05, rows[0]), (0.02, rows[1])):
        params.extra_args["adainfer_epsilon"] = epsilon
        found = admitted(admission, params, [5] * 8 + [*end])
        assert (found.threshold_row if epsilon == 0.05 else found.last_token_row) == row


def test_policies_monitors_and_admission_number_threshold_rows_alike(tiny_model, monkeypatch):
    """Also after a part has come, and after one has gone."""
    settings = Settings(artifact={"z": "", "a": "", "b": ""}, shadow_rate=0.5)

    def artifact(**changes: Any) -> Artifact:
        config = tiny_config(tiny_model, **changes)
        return Artifact(config, tiny_tensors(config))

    def built(artifacts: dict[str, Artifact]) -> dict[str, Any]:
        return {
            name: (
                whole,
                {n: Policy(part, CPU) for n, part in whole.parts(name).items()},
            )
            for name, whole in artifacts.items()
        }

    def admit(config: Any, settings: Settings, configs: Any) -> Admission:
        return Admission(settings, configs)

    monkeypatch.setattr(Admission, "from_config", admit)
    start = built({"z": artifact(**POOLED), "a": artifact(), "b": artifact(**ALONE)})
    policies = PolicySet({n: p for _, parts in start.values() for n, p in parts.items()}, range(6))
    model = SimpleNamespace(
        settings=settings,
        artifacts={name: whole for name, (whole, _) in start.items()},
        loop=SimpleNamespace(policies=policies, monitors=dict.fromkeys(policies.names[:-1])),
    )
    new = built({"z": artifact(**ALONE), "b": artifact(**POOLED)})
    served = ServedPolicies(model, None, SimpleNamespace())
    _, chosen, monitors, admission = served._composed(new)
    names = ["z", "a", "b", "b:last-token"]
    assert [*chosen.names[:-1]] == [*monitors] == names
    assert [*admission._rows.first.items()] == list(zip(names, (0, 2, 4, 6), strict=True))
    assert chosen.owners(np.arange(8)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert monitors["a"] is None  # it stays
    loop: Any = SimpleNamespace(monitors=monitors | {"a": monitors["b"]})
    loop.policies = chosen
    assert ExitLoop.tightened(loop).tolist() == [False] * 8


def test_before_the_first_request_it_has_read_what_it_will_read(pooled):
    policy = Policy(Artifact(pooled, tiny_tensors(pooled)).parts("a")["a"], CPU)
    read = []
    decide = policy.decide
    policy.decide = lambda index, rows: read.append(rows.hidden) or decide(index, rows)
    warm_up(PolicySet({"a": policy}), torch.zeros(20, 64, dtype=torch.bfloat16))
    assert {(rows.dtype, rows.shape[1]) for rows in read} == {(torch.float32, 128)}


def test_chunks_beyond_a_sliding_window_are_read_too(pooled, tmp_path):
    """Only tokens that may wait for layers, while more follow, must lie inside of it."""
    save_artifact(tmp_path / "policy", pooled, tiny_tensors(pooled), {}, "card\n")
    carried = SimpleNamespace(ends={"a": 20})
    running = running_requests({"artifact": str(tmp_path / "policy")}, carried=carried)
    running.window = 8
    labels = list(pooled.label_ids)
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=labels)
    running.add(new_request(params, [5] * 30))
    for computed, count in ((0, 20), (20, 10)):
        step = step_of_one(running, computed, count, ends=computed > 0)
        assert step.pooled_from.tolist() == [POOLED_FROM]
        assert step.threshold_rows.tolist() == [1]
