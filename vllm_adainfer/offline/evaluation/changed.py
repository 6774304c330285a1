"""The prompts whose answer an early exit changed, with what the policy saw of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.label_subsets import ALL, bits_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.evaluation.sequences import Tokens
from vllm_adainfer.offline.pretrained import Model
from vllm_adainfer.offline.reports.page import Changed
from vllm_adainfer.offline.reports.views import (
    View,
    deciding_part,
    record_prompts,
    student_reader,
    threshold_row,
    token_namer,
    views_of,
)

MOST = 100  # prompts that are shown for each bound


def changed_prompts(
    model: Model,
    artifact: str,
    config: ArtifactConfig,
    examples: Sequence[Example],
    runs: Mapping[float, Run],
    max_tokens: int,
) -> tuple[list[Changed], list[str]]:
    """The first `MOST` prompts for each bound, and sentences about what is not shown.

    Args:
        model: the model that answered.
        artifact: directory or hub id.
        config: the artifact's config, with the bounds that were measured.
        examples: the prompts.
        runs: one round of ours by epsilon, with `NEVER_EXIT`.
        max_tokens: generated tokens per prompt; what the policy saw is shown only for one token.

    """
    full = runs[NEVER_EXIT].texts
    pairs, notes = [], []
    for index, level in enumerate(config.levels):
        early = runs[level.epsilon].texts
        found = [place for place in range(len(examples)) if early[place] != full[place]]
        pairs += [(index, place) for place in found[:MOST]]
        if len(found) > MOST:
            notes.append(
                f"At the bound of {100 * level.epsilon:g} %, {len(found) - MOST} more prompts "
                f"changed; the first {MOST} are shown."
            )
    views = {}
    if pairs and max_tokens == 1:
        views = _views(model, artifact, config, examples, pairs)
        notes.append(
            "What the policy saw comes from one more run. If no exit or the same answer is shown, "
            "the request was so close to the other answer that rounding decided: it depends on "
            "the batch."
        )
    name = token_namer(config, model.tokenizer)

    def answer(text: Tokens) -> str:
        one_token = len(text) == 1 and not config.choices
        return name(text[0]) if one_token else repr(model.tokenizer.decode(text))

    changed = [
        Changed(
            level=index,
            place=examples[place].place,
            prompt=examples[place].text,
            full=answer(full[place]),
            early=answer(runs[config.levels[index].epsilon].texts[place]),
            views=views.get((index, place), ()),
        )
        for index, place in pairs
    ]
    return changed, notes


def _views(
    model: Model,
    artifact: str,
    config: ArtifactConfig,
    examples: Sequence[Example],
    pairs: Sequence[tuple[int, int]],
) -> dict[tuple[int, int], list[View]]:
    """The views by level and prompt; runs the prompts once more, at full depth."""
    places = sorted({place for _, place in pairs})
    recording = record_prompts(model, config, [examples[place] for place in places])
    loaded, name = load_artifact(artifact), token_namer(config, model.tokenizer)
    read, views = student_reader(artifact, config, model), {}
    for index, place in pairs:
        example = examples[place]
        try:
            part = deciding_part(loaded, example.token_ids)
            row, _ = threshold_row(part.config, config.levels[index].epsilon, example.token_ids)
        except AdaInferError:
            continue  # it never exits, so the change is due to rounding
        subset = ALL
        if config.label_pool and example.labels is not None:
            subset = bits_of(example.labels, config.label_ids)
        prompt = places.index(place)
        text = read(example.token_ids)
        views[index, place] = views_of(part, recording, prompt, row, name, subset, text)
    return views
