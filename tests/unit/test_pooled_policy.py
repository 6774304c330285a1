"""A pooled policy has two parts: for prompts that it sees as a whole, and for all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from tests.tiny import tiny_config, tiny_tensors
from tests.unit.test_artifact_facts import DETAILS
from vllm_adainfer.artifact.artifact import Artifact, all_parts
from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.fields import LastToken, Level, Question
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.engine.startup.banner import policy_banner
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.frontend.metrics import EngineMetrics
from vllm_adainfer.frontend.series import register_series
from vllm_adainfer.offline.facts.artifact import artifact_facts
from vllm_adainfer.offline.facts.document import as_text
from vllm_adainfer.offline.reports.views import decided_by
from vllm_adainfer.settings.engine import Settings

POOLED_FROM = 4


def levels(*epsilons: float) -> tuple[Level, ...]:
    return tuple(
        Level(epsilon=epsilon, disagreement=0.0, risk=0.0, bound=epsilon / 2, layers_saved=0.1)
        for epsilon in epsilons
    )


def last_token(**changes: Any) -> LastToken:
    return LastToken(**{"exit_points": (2, 3), "levels": levels(0.02, 0.05), **changes})


POOLED: dict[str, Any] = {
    "probe": "pooled-label-head",
    "pooled_from": POOLED_FROM,
    "exit_points": (0, 2, 5),
    "last_token": last_token(),
}
ALONE = {**POOLED, "last_token": None}
QUESTIONS = (
    Question(name="mood", ends=((20, 30),), certified=(0.02, 0.05)),
    Question(name="side", ends=((30, 31),), certified=(0.05,)),
)


@pytest.fixture
def pooled(tiny_model) -> ArtifactConfig:
    return tiny_config(tiny_model, **POOLED)


def test_it_is_read_back_as_it_was_written_and_each_part_has_its_own_tensors(pooled, tmp_path):
    tensors = tiny_tensors(pooled)
    save_artifact(tmp_path / "policy", pooled, tensors, {}, "card\n")
    loaded = load_artifact(str(tmp_path / "policy"))
    assert loaded.config == pooled
    assert loaded.config.all_exit_points == (0, 2, 3, 5)
    whole, last = loaded.parts("a").values()
    assert list(loaded.parts("a")) == ["a", "a:last-token"]
    assert (last.config.probe, last.config.exit_points) == ("label-head", (2, 3))
    assert whole.tensors["exit.2.head_weight"].shape == (2, 2 * 64)
    assert last.tensors["exit.2.head_weight"].shape == (2, 64)
    kept = {**whole.tensors, **{f"{LAST_TOKEN}.{n}": t for n, t in last.tensors.items()}}
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)


def test_each_part_has_its_series_from_the_start(pooled):
    configs = {"reviews": pooled}
    EngineMetrics(register_series((0, 2, 3, 5, 6)), "pooled", 0, configs)
    for name, part in all_parts(configs).items():
        labels = {"model_name": "pooled", "engine": "0", "policy": name}
        assert REGISTRY.get_sample_value("adainfer:layer_rows_executed_total", labels) == 0
        assert REGISTRY.get_sample_value("adainfer:policy_info", {**labels, "adapter": ""}) == 1
        for level in part.levels:
            bound = {**labels, "epsilon": f"{level.epsilon:g}"}
            assert REGISTRY.get_sample_value("adainfer:policy_exits_allowed", bound) == 1


@pytest.mark.parametrize(
    ("changes", "said", "logged"),
    [
        (
            POOLED,
            "Prompts of at most 4 tokens, and those of which a token from that position on is in "
            "the prefix cache, are decided by the state of their last token alone, after layers "
            "2, 3, within bounds of their own, which cover no mixture of both (calibrate again):",
            "prefix cache are decided by the state of their last token alone, after layers 2, 3)",
        ),
        (
            {**POOLED, "last_token": last_token(one_bound=True)},
            "alone, after layers 2, 3, within the same bounds, which hold whichever heads decide",
            "prefix cache are decided by the state of their last token alone, after layers 2, 3)",
        ),
        (
            ALONE,
            "is in the prefix cache, run all layers.",
            "(those with tokens of their own in the prefix cache run all layers)",
        ),
    ],
    ids=["an artifact from before", "one bound for both parts", "without"],
)
def test_it_says_what_becomes_of_prompts_that_it_does_not_see_as_a_whole(
    tiny_model, changes, said, logged
):
    config = tiny_config(tiny_model, **changes)
    assert said in as_text(artifact_facts(config, DETAILS))
    assert logged in policy_banner("a", config, Settings(artifact="a"))
    assert said not in as_text(artifact_facts(tiny_config(tiny_model), DETAILS))


@pytest.mark.parametrize(("length", "points"), [(POOLED_FROM, (2, 3)), (9, (0, 2, 5))])
def test_a_prompt_is_explained_by_the_part_that_decides_it(pooled, length, points):
    artifact, prompt = Artifact(pooled, tiny_tensors(pooled)), [5] * length
    part, *row_and_bound = decided_by(artifact, 0.05, prompt)
    assert part.config.exit_points == points
    assert row_and_bound == [1, 0.05]
    assert part.tensors["thresholds"].shape == (2, len(points))


def test_where_no_part_decides_a_prompt_it_is_said_to_run_all_layers(tiny_model):
    config = tiny_config(tiny_model, **ALONE)
    with pytest.raises(AdaInferError, match="after the first 4, and this prompt, which has no mo"):
        decided_by(Artifact(config, tiny_tensors(config)), 0.05, [5] * 4)


def test_an_artifact_of_one_part_is_its_own(tiny_policy):
    artifact = load_artifact(str(tiny_policy))
    assert artifact.parts("a").keys() == {"a"}
    assert decided_by(artifact, 0.05, [5])[0].config is artifact.config
