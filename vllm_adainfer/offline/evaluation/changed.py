"""The prompts whose answer an early exit changed, with what the policy saw of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.label_subsets import ALL, bits_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.adapter import NamedAdapter
from vllm_adainfer.offline.calibration.collect import record, recording_engine
from vllm_adainfer.offline.calibration.data import Example
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.evaluation.sequences import Tokens
from vllm_adainfer.offline.reports.page import Changed
from vllm_adainfer.offline.reports.views import View, tag_at, views_of

MOST = 100  # prompts that are shown for each bound


@dataclass(frozen=True)
class Model:
    """What is needed to run the prompts once more.

    Attributes:
        path: directory or hub id.
        config: Hugging Face's, of the language model.
        tokenizer: Hugging Face's.
        adapter: of all prompts; None for the base model.

    """

    path: str
    config: Any
    tokenizer: Any
    adapter: NamedAdapter | None


def changed_prompts(
    model: Model,
    artifact: str,
    config: ArtifactConfig,
    examples: Sequence[Example],
    runs: Mapping[float, Run],
    max_tokens: int,
) -> tuple[list[Changed], list[str]]:
    """Of the first `MOST` at each bound, and sentences about what is not shown.

    Args:
        model: that answered.
        artifact: directory or hub id.
        config: of the artifact, with the bounds that were measured.
        examples: the prompts.
        runs: a round of ours by epsilon, with `NEVER_EXIT`.
        max_tokens: that were generated; what the policy saw is shown of a first token alone.

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
    named = _namer(config, model.tokenizer)
    views = {} if max_tokens > 1 else _views(model, artifact, config, examples, pairs, named)
    if views:
        notes.append(
            "What the policy saw is from one more run. Where it leaves nowhere, or with the answer "
            "of full depth, the request was within rounding of the other answer: a processor may "
            "round a row otherwise in another batch."
        )
    answered = _answer(config, model.tokenizer, named)
    changed = [
        Changed(
            level=index,
            place=examples[place].place,
            prompt=examples[place].text,
            full=answered(full[place]),
            early=answered(runs[config.levels[index].epsilon].texts[place]),
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
    named: Callable[[int], str],
) -> dict[tuple[int, int], list[View]]:
    """By level and prompt; the prompts run at full depth once more, and are recorded."""
    places = sorted({place for _, place in pairs})
    if not places:
        return {}
    chosen, settings = [examples[place] for place in places], {"enforce_eager": True}
    if model.adapter is not None:
        settings |= model.adapter.engine_settings
    points = config.exit_points
    with recording_engine(model.path, model.config, chosen, points, **settings) as engine:
        recording = record(
            engine,
            chosen,
            config.label_ids,
            points,
            adapter=model.adapter and model.adapter.request,
        )
    loaded, views = load_artifact(artifact), {}
    for index, place in pairs:
        example = examples[place]
        try:
            tag, _ = tag_at(loaded.config, config.levels[index].epsilon, example.token_ids)
        except AdaInferError:
            continue  # its question leaves nowhere, so rounding has changed the answer
        subset = ALL
        if config.label_pool and example.labels is not None:
            subset = bits_of(example.labels, config.label_ids)
        row = places.index(place)
        views[index, place] = views_of(loaded, recording, row, tag, named, subset)
    return views


def _namer(config: ArtifactConfig, tokenizer: Any) -> Callable[[int], str]:
    names = {label.token_id: label.name for label in config.labels}
    return lambda token: repr(names.get(token) or tokenizer.decode([token]))


def _answer(
    config: ArtifactConfig, tokenizer: Any, named: Callable[[int], str]
) -> Callable[[Tokens], str]:
    def answer(text: Tokens) -> str:
        if len(text) == 1 and not config.choices:
            return named(text[0])
        return repr(tokenizer.decode(text))

    return answer
