from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import EXIT_POINTS, tiny_config, tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact, digest_of
from vllm_adainfer.artifact.fields import Adapter, Gate, Label, Level
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.engine.runner import ranks as agreement
from vllm_adainfer.engine.worker.reload import check_replaces
from vllm_adainfer.errors import AdaInferError

STRICT = Level(epsilon=0.01, disagreement=0.0, risk=0.0, bound=0.01, layers_saved=0.1)


def labels(*ids: int) -> tuple[Label, ...]:
    return tuple(Label(name=str(token), token_id=token) for token in ids)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architecture": "OPTForCausalLM"},
            "policy reviews is for a model with architecture = OPTForCausalLM, this one has "
            "LlamaForCausalLM: calibrate for this model",
        ),
        ({"layers": 7}, "with layers = 7, this one has 6: calibrate for this model"),
        ({"hidden_size": 128}, "with hidden_size = 128, this one has 64"),
        ({"vocab_size": 5000}, "with vocab_size = 5000, this one has "),
        ({"head_size": 32}, "with head_size = 32, this one has None"),
        (
            {"exit_points": (2, 4)},
            "policy reviews has exit points [2, 4], this engine only [2, 3, 5]: restart it, or "
            "calibrate with --exit-points 2,3,5",
        ),
        (
            {"labels": labels(1, 2)},
            "policy reviews has other labels than before: restart the engine",
        ),
        (
            {"adapter": Adapter(name="mood", fingerprint="1")},
            "policy reviews is for another LoRA adapter than before",
        ),
        (
            {"probe": "logit-lens", "candidates": "full", "labels": ()},
            "policy reviews has other labels than before: restart the engine",
        ),
        (
            {"max_tokens": 64},
            "policy reviews was calibrated for 64 tokens, the one before for 1: restart the engine",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_running_engine_cannot_change_to_is_refused_with_its_cure(
    tiny_model, changes, sentence
):
    old, new = tiny_config(tiny_model), tiny_config(tiny_model, **changes)
    with pytest.raises(AdaInferError) as caught:
        check_replaces("reviews", new, old, EXIT_POINTS)
    assert sentence in str(caught.value)


GATE = Gate(label="bad", probability=0.5)
PROBABILITY: dict[str, Any] = {"risk": "probability", "tolerance": 0.05}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            {},
            PROBABILITY,
            "policy reviews bounds probability, the one before disagreement: the two policies "
            "admit different requests: restart the engine",
        ),
        (
            {**PROBABILITY, "label_mass": True},
            {"risk": "accuracy", "bound": "wsr"},
            "policy reviews bounds accuracy, the one before probability: the two policies ",
        ),
        (
            {**PROBABILITY, "label_mass": True},
            PROBABILITY,
            "policy reviews does not certify the label mass, unlike the one before: restart the",
        ),
        (
            PROBABILITY,
            {**PROBABILITY, "label_mass": True},
            "policy reviews certifies the label mass, unlike the one before: restart the engine",
        ),
        (
            {**PROBABILITY, "tolerance": None, "gates": (GATE,)},
            {**PROBABILITY, "tolerance": None, "gates": (Gate(probability=0.5),)},
            "policy reviews has other gates than before: restart the engine",
        ),
        (PROBABILITY, {**PROBABILITY, "tolerance": None, "gates": (GATE,)}, "has other gates than"),
        (
            {"never_early": ("bad",)},
            {},
            "policy reviews keeps other labels from being early answers than the one before: rest",
        ),
    ],
    ids=[
        *("to probability", "from probability", "mass lost", "mass won"),
        *("other gate", "to a gate", "never early"),
    ],
)
def test_a_reload_may_not_change_what_is_promised(tiny_model, before, after, sentence):
    old, new = tiny_config(tiny_model, **before), tiny_config(tiny_model, **after)
    with pytest.raises(AdaInferError) as caught:
        check_replaces("reviews", new, old, EXIT_POINTS)
    assert sentence in str(caught.value)


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
    check_replaces("reviews", new, old, EXIT_POINTS)


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
