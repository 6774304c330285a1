"""What `explain` shows of a policy for objects: the whole object, and the field that is least sure.

A plain computation says what the heads find: each field by its own row.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adainfer_kernels import Head

from tests.objects import object_config, two_fields
from tests.tiny import EXIT_POINTS, LAYERS, tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.offline.calibration.record.rows import Rows, ServedModel
from vllm_adainfer.offline.reports.explain import Explanation
from vllm_adainfer.offline.reports.views import View, token_namer, views_of
from vllm_adainfer.policy.probe import Probe

WIDTH, PROMPTS, VOCABULARY = 64, 6, 200


@pytest.fixture
def artifact(tiny_model) -> Artifact:
    config = object_config(tiny_model)
    return Artifact(config, tiny_tensors(config))


@pytest.fixture
def recording() -> Rows:
    generator = torch.Generator().manual_seed(3)

    def states() -> torch.Tensor:
        return 10 * torch.randn(PROMPTS, 2, WIDTH, generator=generator)

    head = Head(torch.randn(VOCABULARY, WIDTH, generator=generator))
    link = two_fields().link
    return Rows(
        ServedModel(LAYERS, LAYERS, Probe(head), "", 1e-4, 1e-5),
        {layer: states() for layer in EXIT_POINTS},
        states(),
        np.arange(PROMPTS),
        np.arange(PROMPTS),
        np.ones(PROMPTS),
        values=link.probabilities(torch.randn(PROMPTS, 5, generator=generator)),
    )


def views(artifact: Artifact, recording: Rows, prompt: int) -> list[View]:
    return views_of(artifact, recording, prompt, 0, token_namer(artifact.config, None))


@pytest.mark.parametrize("prompt", range(PROMPTS))
def test_each_view_is_the_object_of_its_heads(artifact, recording, prompt):
    seen = views(artifact, recording, prompt)[:-1]
    for layer, view in zip(EXIT_POINTS, seen, strict=True):
        weight, [mood, was_seen] = (
            artifact.tensors[f"exit.{layer}.head_weight"],
            recording.states[layer][prompt],
        )
        fields = [(weight[:3] @ mood).softmax(0), (weight[3:] @ was_seen).softmax(0)]
        moods, answers = ("bad", "fair", "good"), ("false", "true")
        places = [int(one.argmax()) for one in fields]
        assert view.answer == f'mood="{moods[places[0]]}", seen={answers[places[1]]}'
        leads = [float(top[0] - top[1]) for top in (one.topk(2).values for one in fields)]
        assert view.least_sure == ("mood", "seen")[int(np.argmin(leads))]
        assert view.gap == pytest.approx(min(leads), abs=1e-5)
        assert view.top_prob == pytest.approx(float(fields[0].max() * fields[1].max()), abs=1e-5)


def test_each_field_is_the_least_sure_one_of_some_prompt(artifact, recording):
    seen = [view for prompt in range(PROMPTS) for view in views(artifact, recording, prompt)]
    assert {view.least_sure for view in seen} == {"mood", "seen"}


def test_full_depth_shows_the_object_that_the_model_wrote(artifact, recording):
    wrote = [views(artifact, recording, prompt)[-1] for prompt in range(PROMPTS)]
    link, words = two_fields().link, two_fields().in_words
    assert [view.answer for view in wrote] == [words(link.places(code)) for code in range(PROMPTS)]
    for view, values in zip(wrote, recording.values, strict=True):
        assert view.top_prob == pytest.approx(float(values[:3].max() * values[3:].max()))


def test_the_table_has_a_column_for_the_least_sure_field_where_there_are_fields():
    early = View(3, 'mood="bad"', 0.9, 0.8, 2.0, 1.5, True, "mood")
    full = View(6, 'mood="bad"', 0.9, 0.8, least_sure="seen")
    table = str(Explanation(12, 6, 0.02, 3, (early, full))).splitlines()
    assert "least sure" in table[0]
    assert table[2].split()[2] == "mood"
    plain = View(3, "'bad'", 0.9, 0.8)
    assert "least sure" not in plain.facts
