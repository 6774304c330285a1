"""A policy belongs to a base model and an adapter: requests find it by both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.adapters import PROJECTIONS, save_adapter
from tests.admitted import admitted, resolved, row_of
from tests.tiny import tiny_artifact, tiny_config
from vllm_adainfer.artifact.fingerprints import adapter_fingerprint
from vllm_adainfer.engine.admission.admission import Admission, check_request
from vllm_adainfer.engine.runner.adapters import StepAdapters
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.offline.adapter import adapter_for, read_adapter
from vllm_adainfer.settings.engine import Settings, read_settings

BASE, ADAPTED = 1, 3  # tags: the second level of the first policy, and of the second


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory) -> Path:
    return save_adapter(reference, tmp_path_factory.mktemp("adapters") / "mood", seed=1)


@pytest.fixture(scope="module")
def admission(tiny_model, saved, tmp_path_factory) -> Admission:
    folder = tmp_path_factory.mktemp("policies")
    adapter = read_adapter(f"mood={saved}").described
    sources = {
        "base": str(tiny_artifact(tiny_model, folder / "base")),
        "adapted": str(tiny_artifact(tiny_model, folder / "adapted", adapter=adapter)),
    }
    return Admission(Settings(artifact=sources))


@pytest.fixture(scope="module")
def asked(tiny_model) -> Any:
    labels = list(tiny_config(tiny_model).label_ids)

    def request(**extra_args: Any) -> SamplingParams:
        plain = {"temperature": 0, "max_tokens": 1, "allowed_token_ids": labels}
        return SamplingParams(**plain, extra_args=extra_args)

    return request


def changed(saved: Path, directory: Path) -> Path:
    """Another adapter: the same with other weights."""
    shutil.copytree(saved, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(
        {name: 2 * one for name, one in tensors.items()}, directory / "adapter_model.safetensors"
    )
    return directory


def test_a_request_finds_its_policy_by_its_adapter(admission, asked, saved, tmp_path):
    mood = LoRARequest("mood", 1, str(saved))
    assert row_of(admission, asked()) == BASE
    assert row_of(admission, asked(), adapter=mood) == ADAPTED
    elsewhere = shutil.copytree(saved, tmp_path / "copy")
    assert row_of(admission, asked(), adapter=LoRARequest("mood", 7, str(elsewhere))) == ADAPTED
    assert admission.policies.ambiguous == []


@pytest.mark.parametrize("other", ["of another name", "of other weights", "that is none"])
def test_a_request_with_an_adapter_without_a_policy_runs_all_layers(
    admission, asked, saved, tmp_path, other
):
    adapter = {
        "of another name": lambda: LoRARequest("taste", 1, str(saved)),
        "of other weights": lambda: LoRARequest("mood", 1, str(changed(saved, tmp_path / "other"))),
        "that is none": lambda: LoRARequest("mood", 1, str(tmp_path)),
    }[other]()
    assert row_of(admission, asked(), adapter=adapter) == FULL_DEPTH
    assert not admitted(admission, asked(), adapter=adapter).has_choice_policy


def test_the_scheduler_takes_a_request_for_one_that_exits_by_its_adapters_name_alone(
    admission, asked, tmp_path
):
    """It reads no files: those of a running adapter may change, hang or be gone."""
    gone = LoRARequest("mood", 1, str(tmp_path / "gone"))
    decided = admission.arrival.resolve("id", asked(), gone)
    assert decided.may_exit
    assert decided.saving == ("adapted", 0.2)
    assert admission.admit(decided, [], gone, fingerprint=None).threshold_row == FULL_DEPTH
    assert not resolved(admission, asked(), LoRARequest("taste", 2, str(tmp_path))).may_exit


def test_naming_the_policy_of_another_adapter_is_no_way_to_it(admission, asked, saved):
    mood = LoRARequest("mood", 1, str(saved))
    assert row_of(admission, asked(adainfer_policy="adapted")) == FULL_DEPTH
    assert row_of(admission, asked(adainfer_policy="base"), adapter=mood) == FULL_DEPTH
    assert row_of(admission, asked(adainfer_policy="adapted"), adapter=mood) == ADAPTED


def test_an_epsilon_is_refused_where_no_policy_certifies_it(admission, asked):
    """The frontend does not know the adapter of a request."""
    check_request(asked(adainfer_epsilon=0.02), admission)
    with pytest.raises(AdaInferError, match="stricter than the artifact's strictest"):
        check_request(asked(adainfer_epsilon=0.001), admission)


def test_log_probabilities_of_prompts_are_refused_where_they_would_end_the_engine(
    tiny_policy, asked
):
    reads = asked()
    reads.prompt_logprobs = 1
    settings = Settings(artifact=str(tiny_policy))
    check_request(reads, Admission(settings))
    with pytest.raises(AdaInferError, match=r"prompt_logprobs .* ends the engine"):
        check_request(reads, Admission(settings, serves_prompt_logprobs=False))
    check_request(asked(), Admission(settings, serves_prompt_logprobs=False))


def test_without_policies_for_adapters_requests_with_one_run_all_layers(tiny_policy, asked, saved):
    admission = Admission(Settings(artifact=str(tiny_policy)))
    assert row_of(admission, asked()) == BASE
    assert row_of(admission, asked(), adapter=LoRARequest("mood", 1, str(saved))) == FULL_DEPTH


@pytest.mark.parametrize(
    ("extra_args", "with_adapter", "may_exit"),
    [
        ({}, True, True),
        ({"adainfer": 0}, True, False),
        ({"adainfer_epsilon": 0}, True, False),
        ({}, False, False),
    ],
)
def test_where_policies_come_with_adapters_a_request_with_one_may_exit_for_the_scheduler(
    asked, saved, extra_args, with_adapter, may_exit
):
    admission = Admission(Settings(exit_points=(2, 3)))
    adapter = LoRARequest("mood", 1, str(saved)) if with_adapter else None
    assert resolved(admission, asked(**extra_args), adapter).may_exit == may_exit
    assert row_of(admission, asked(**extra_args), adapter=adapter) == FULL_DEPTH


def test_where_policies_come_with_adapters_any_request_for_a_choice_may_end_with_its_first_token(
    asked, saved
):
    admission, adapter = Admission(Settings(exit_points=(2,))), LoRARequest("mood", 1, str(saved))
    structured = StructuredOutputsParams(choice=["yes", "no"])
    choice = SamplingParams(temperature=0, max_tokens=9, structured_outputs=structured)
    choice.update_from_generation_config({}, eos_token_id=2)
    assert resolved(admission, choice, adapter).may_end_after_first_token
    assert not resolved(admission, choice).may_end_after_first_token
    assert not resolved(admission, asked(), adapter).may_end_after_first_token


@pytest.mark.parametrize(
    ("switch", "sentence"),
    [
        ({"exit_points": []}, "exit_points: Tuple should have at least 1 item"),
        ({"exit_points": [2], "record": [2]}, '"exit_points" goes with "artifact" or stands alone'),
        ({"exit_points": [2], "exit_script": [2]}, '"exit_points" goes with "artifact"'),
    ],
)
def test_exit_points_that_go_with_nothing_are_refused(switch, sentence):
    with pytest.raises(AdaInferError, match=sentence):
        read_settings({"adainfer": switch})


def test_a_fingerprint_is_of_weights_and_scale_wherever_they_lie(saved, tmp_path):
    found = adapter_fingerprint(saved)
    copied = shutil.copytree(saved, tmp_path / "copy")
    config = copied / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "base_model_name_or_path": "elsewhere"}))
    assert adapter_fingerprint(copied) == found
    assert adapter_fingerprint(changed(saved, tmp_path / "other")) != found
    config.write_text(json.dumps({**settings, "lora_alpha": 16}))
    assert adapter_fingerprint(copied) != found


def test_adapters_are_mapped_to_the_rows_that_are_left(monkeypatch):
    told: list[Any] = []
    monkeypatch.setattr(
        "vllm_adainfer.engine.runner.adapters.use_adapters",
        lambda *arguments: told.append(arguments[2:]),
    )
    first, second = LoRARequest("first", 4, "a"), LoRARequest("second", 9, "b")
    step = StepAdapters(None, [first, None, second, first])
    layout = RowLayout(np.array([2, 3, 1, 2]), np.array([1, 2, 0, 1]))
    step.of_rows(layout)()
    step.of_rows(layout.only(np.array([1, 2])))()
    step.of_rows(layout.last_only()[0])()
    step.use_for_logits(np.array([3, 1]))
    step.use_for_logits(np.array([], dtype=np.int64))
    assert told == [
        ((4, 4, 0, 0, 0, 9, 4, 4), (4, 0, 9, 4)),
        ((0, 0, 0, 9), (0, 9)),
        ((4, 0, 9, 4), (4, 0, 9, 4)),
        ((4, 0), (4, 0)),
    ]


def with_config(saved: Path, folder: Path, config: Any) -> str:
    """The adapter with another text as its config, or with changes to it."""
    path = shutil.copytree(saved, folder / "copy") / "adapter_config.json"
    changed = config
    if not isinstance(config, str):
        changed = json.dumps({**json.loads(path.read_text()), **config})
    path.write_text(changed)
    return f"mood={path.parent}"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("r = 4", "adapter_config.json is not the config of a LoRA adapter: Expecting value"),
        ({"r": "4"}, "r = '4' is not a rank that vLLM serves"),
        ({"r": 4096}, "r = 4096 is not a rank that vLLM serves"),
    ],
)
def test_what_is_no_adapter_is_refused_in_one_sentence(saved, tmp_path, config, sentence):
    with pytest.raises(AdaInferError, match=sentence):
        read_adapter(with_config(saved, tmp_path, config))
    with pytest.raises(AdaInferError, match="give the name of requests and a directory, NAME=DIR"):
        read_adapter(str(saved))
    needs = "is not a LoRA adapter: it needs adapter_config.json and adapter_model.safe"
    with pytest.raises(AdaInferError, match=needs):
        read_adapter(f"mood={tmp_path}")


def test_an_adapter_of_the_head_is_refused_because_probes_read_that_of_the_base(
    reference, tmp_path
):
    directory = save_adapter(reference, tmp_path / "head", 1, [*PROJECTIONS, "lm_head"])
    with pytest.raises(AdaInferError, match="the adapter mood changes lm_head"):
        read_adapter(f"mood={directory}")


def test_an_artifact_goes_with_its_adapter_alone(tiny_model, saved, tmp_path):
    mood = read_adapter(f"mood={saved}")
    base, adapted = tiny_config(tiny_model), tiny_config(tiny_model, adapter=mood.described)
    assert adapter_for(base, None) is None
    assert adapter_for(adapted, mood) is mood
    renamed = read_adapter(f"taste={saved}")
    other = read_adapter(f"mood={changed(saved, tmp_path / 'other')}")
    for config, adapter, sentence in [
        (base, mood, "calibrated for the base model: drop --lora"),
        (adapted, None, "with a LoRA adapter: give --lora mood=DIR"),
        (adapted, renamed, "with a LoRA adapter: give --lora mood=DIR"),
        (adapted, other, "calibrated with another adapter mood: its fingerprint is"),
    ]:
        with pytest.raises(AdaInferError, match=sentence):
            adapter_for(config, adapter)


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (17, 32), (512, 512)])
def test_the_engine_has_room_for_the_rank(saved, tmp_path, rank, room):
    adapter = read_adapter(with_config(saved, tmp_path, {"r": rank}))
    assert adapter.engine_settings["max_lora_rank"] == room
