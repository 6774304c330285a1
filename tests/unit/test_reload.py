from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.e2e.objects import objects
from tests.tiny import EXIT_POINTS, LAYERS, tiny_config, tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact, digest_of
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Adapter, Label, Level
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.engine.runner import ranks as agreement
from vllm_adainfer.engine.worker import served_policies
from vllm_adainfer.engine.worker.served_policies import (
    ServedPolicies,
    check_cuts,
    check_replaces,
)
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.promise.gates import Gate

STRICT = Level(epsilon=0.01, disagreement=0.0, risk=0.0, bound=0.01, layers_saved=0.1)


def labels(*ids: int) -> tuple[Label, ...]:
    return tuple(Label(name=str(token), token_id=token) for token in ids)


GATE = Gate(label="bad", probability=0.5)
PROBABILITY: dict[str, Any] = {"risk": "probability", "tolerance": 0.05}
GATED = {**PROBABILITY, "tolerance": None, "gates": (GATE,)}
WITH_MASS = {**PROBABILITY, "label_mass": True}


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ({}, {"labels": labels(1, 2)}, "its labels"),
        ({}, {"probe": "logit-lens", "candidates": "full", "labels": ()}, "its labels"),
        ({}, {"adapter": Adapter(name="mood", fingerprint="1")}, "its LoRA adapter, or in the we"),
        ({}, {"max_tokens": 64}, "whether it is for more than one token"),
        ({}, PROBABILITY, "whether it bounds probabilities"),
        (WITH_MASS, {"risk": "accuracy", "bound": "wsr"}, "whether it bounds probabilities"),
        (WITH_MASS, PROBABILITY, "whether it certifies the label mass"),
        (PROBABILITY, WITH_MASS, "whether it certifies the label mass"),
        (GATED, {**GATED, "gates": (Gate(probability=0.5),)}, "its gates"),
        (PROBABILITY, GATED, "whether it certifies the label mass"),
        (GATED, PROBABILITY, "its gates"),
        ({"never_early": ("bad",)}, {}, "the labels that are never early answers"),
    ],
)
def test_a_reload_may_not_change_which_requests_are_admitted(tiny_model, before, after, what):
    old, new = tiny_config(tiny_model, **before), tiny_config(tiny_model, **after)
    with pytest.raises(AdaInferError) as caught:
        check_replaces("reviews", new, old)
    sentence = str(caught.value)
    assert sentence.startswith(f"policy reviews differs from the one before in {what}")
    assert sentence.endswith(": restart the engine")


def deciding(model: Path, asked: Objects) -> ArtifactConfig:
    """The config of a policy for objects."""
    return ArtifactConfig.model_validate({**dict(tiny_config(model)), "output": asked})


OTHER_GUESS = [field.model_copy(update={"guess": 0}) for field in objects().fields]


@pytest.mark.parametrize(
    "other",
    [
        objects(space=""),
        objects().model_copy(update={"schema_digest": "another"}),
        objects().model_copy(update={"fields": tuple(OTHER_GUESS)}),
        objects().model_copy(update={"guesser": "another"}),
    ],
    ids=["written", "schema", "commonest", "guesser"],
)
def test_a_reload_may_not_change_the_objects_that_the_scheduler_guesses_and_writes(
    tiny_model, other
):
    before = deciding(tiny_model, objects())
    check_replaces("reviews", deciding(tiny_model, objects()), before)
    with pytest.raises(AdaInferError, match="its schema, its guesses, or how its"):
        check_replaces("reviews", deciding(tiny_model, other), before)


def test_an_adapter_brings_no_policy_for_objects_since_the_scheduler_would_not_know_it(
    tiny_model, monkeypatch
):
    monkeypatch.setattr(served_policies, "refuse_policy", lambda *_: None)
    model = SimpleNamespace(
        artifacts={},
        check_calibrated=lambda _: None,
        num_own_kv_layers=LAYERS,
        settings=SimpleNamespace(artifacts={}),
        loop=SimpleNamespace(policies=SimpleNamespace(exit_points=EXIT_POINTS)),
    )
    config: Any = None
    served = ServedPolicies(model, config, running=SimpleNamespace())  # type: ignore[arg-type]
    served.check("reviews", tiny_config(tiny_model))
    with pytest.raises(AdaInferError, match="policy reviews decides objects, and only policies"):
        served.check("reviews", deciding(tiny_model, objects()))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({}, {"risk": "accuracy", "bound": "wsr"}),
        (PROBABILITY, {**PROBABILITY, "tolerance": 0.02}),
        ({}, {"levels": (STRICT,), "epsilon": 0.01, "delta": 0.2}),
        ({}, {"exit_points": (3,)}),
        ({"exit_points": (3,)}, {"exit_points": EXIT_POINTS}),
        ({}, {"probe": "lens", "classifier": "crf", "bound": "wsr"}),
        ({"labels": labels(1, 2)}, {"labels": labels(2, 1)}),
        ({"max_tokens": 64}, {"max_tokens": 32}),
    ],
    ids=[
        "nothing",
        "risk",
        "tolerance",
        "bounds",
        "fewer points",
        "more points",
        "probe",
        "label order",
        "tokens",
    ],
)
def test_whatever_else_was_calibrated_anew_is_served(tiny_model, before, after):
    old, new = tiny_config(tiny_model, **before), tiny_config(tiny_model, **after)
    check_replaces("reviews", new, old)
    check_cuts("reviews", new, EXIT_POINTS)


def test_exit_points_where_the_stack_is_not_cut_are_refused_with_their_cure(tiny_model):
    new = tiny_config(tiny_model, exit_points=(2, 4))
    with pytest.raises(AdaInferError) as caught:
        check_cuts("reviews", new, EXIT_POINTS)
    assert (
        "policy reviews has exit points [2, 4], this engine only [2, 3, 5]: calibrate with "
        "--exit-points 2,3,5, or restart it"
    ) in str(caught.value)


def saved(model: Any, directory: Path, **changes: Any) -> Artifact:
    """An artifact read from files; a change to a tensor is a function of it, under its name."""
    tensors = {key: change for key, change in changes.items() if callable(change)}
    config = tiny_config(
        model, **{key: change for key, change in changes.items() if key not in tensors}
    )
    parts = tiny_tensors(config)
    for key, change in tensors.items():
        parts[key] = change(parts[key])
    save_artifact(directory, config, parts, {}, "card\n")
    return load_artifact(str(directory))


@pytest.mark.parametrize(
    "changes",
    [
        {"delta": 0.2},
        {"base_model": "another"},
        {"thresholds": lambda part: part + 1e-6},
        {"exit.2.head_bias": lambda part: -part},  # minus zero
        {"exit.5.head_weight": lambda part: part.flip(0)},
        {"exit.5.head_weight": lambda part: part.half()},
    ],
    ids=["bound", "model", "one number", "a sign", "order of rows", "dtype"],
)
def test_a_digest_tells_any_difference_and_no_other(tiny_model, tmp_path, changes):
    one, again, other = (
        digest_of({"reviews": saved(tiny_model, tmp_path / name, **own)})
        for name, own in (("one", {}), ("again", {}), ("other", changes))
    )
    assert one == again != other


def test_a_digest_tells_which_policies_there_are(tiny_model, tmp_path):
    artifact = saved(tiny_model, tmp_path / "policy")
    names = ((), ("reviews",), ("topics",), ("reviews", "topics"))
    assert len({digest_of(dict.fromkeys(some, artifact)) for some in names}) == 4


def test_a_digest_fits_a_signed_64_bit_tensor_with_room(tiny_model):
    config = tiny_config(tiny_model)
    digests = [digest_of({str(number): Artifact(config, {})}) for number in range(20)]
    assert all(0 <= digest < 1 << 62 for digest in digests)
    assert torch.tensor(digests).tolist() == digests


@pytest.mark.parametrize(("other", "same"), [(7, True), (8, False)])
def test_ranks_that_have_read_something_else_are_noticed(monkeypatch, other, same):
    def gather(numbers: list[int], own: int, group: str) -> None:
        numbers[:] = [own, other]

    ranks = SimpleNamespace(world_size=2, cpu_group="both")
    monkeypatch.setattr(agreement, "get_tp_group", lambda: ranks)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert agreement.same_on_all_ranks(7) is same
