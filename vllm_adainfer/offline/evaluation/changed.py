"""The prompts whose answer an early exit changed, with what the policy saw of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.outputs import NO_OBJECT
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.evaluation.sequences import Tokens
from vllm_adainfer.offline.pretrained import Model
from vllm_adainfer.offline.reports.views import View, decided_by, token_namer, views_of_prompts

MOST = 100  # prompts that are shown for each bound


def changed_prompts(
    model: Model,
    source: str,
    config: ArtifactConfig,
    examples: Sequence[Example],
    runs: Mapping[float, Run],
    max_tokens: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The first `MOST` prompts for each bound, and sentences about what is not shown.

    The policy's views are shown only where prompts get one token. `config`, of the artifact
    `source`, has the bounds that were measured; `runs` are one round of ours by epsilon.

    Returns:
        of each prompt the index of the bound (``level``), the ``place`` of its row in the data, the
        text of the ``prompt``, the answers ``full`` and ``early``, and the policy's ``views``.

    """
    full, pairs, notes = runs[NEVER_EXIT].texts, [], []
    for index, level in enumerate(config.levels):
        early = runs[level.epsilon].texts
        found = [place for place in range(len(examples)) if early[place] != full[place]]
        pairs += [(index, place) for place in found[:MOST]]
        if len(found) > MOST:
            notes.append(
                f"At the bound of {100 * level.epsilon:g} %, {len(found) - MOST} more prompts "
                f"changed; the first {MOST} are shown."
            )
    views: dict[tuple[int, int], list[View]] = {}
    if pairs and max_tokens == 1:
        artifact, asked = load_artifact(source), {}
        for index, place in pairs:
            example, epsilon = examples[place], config.levels[index].epsilon
            if config.objects and [NO_OBJECT] in (full[place], runs[epsilon].texts[place]):
                continue  # it was cut short: there is no object to show a view of
            with suppress(AdaInferError):  # it never exits, so the change is due to rounding
                part, row, _ = decided_by(artifact, epsilon, example.token_ids)
                asked[index, place] = example, part, row
        seen = views_of_prompts(source, artifact, model, [*asked.values()]) if asked else []
        views = dict(zip(asked, seen, strict=True))
        notes.append(
            "What the policy saw comes from one more run. If no exit or the same answer is shown, "
            "the request was so close to the other answer that rounding decided: it depends on "
            "the batch."
        )
    name = token_namer(config, model.tokenizer)

    def answer(text: Tokens) -> str:
        one_token = len(text) == 1 and not config.choices  # or an object, as a number
        return name(text[0]) if one_token else repr(model.tokenizer.decode(text))

    changed = [
        {
            "level": index,
            "place": examples[place].place,
            "prompt": examples[place].text,
            "full": answer(full[place]),
            "early": answer(runs[config.levels[index].epsilon].texts[place]),
            "views": views.get((index, place), ()),
        }
        for index, place in pairs
    ]
    return changed, notes
