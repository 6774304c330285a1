"""Explain: what a policy sees of one prompt, exit point by exit point, and where it exits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_adainfer.artifact.files import load_artifact, load_details
from vllm_adainfer.artifact.scope import served_prompts
from vllm_adainfer.offline.adapter import NamedAdapter
from vllm_adainfer.offline.calibration.data.examples import Row, make_examples, read_template
from vllm_adainfer.offline.calibration.data.served_schema import longest_object, served_schema
from vllm_adainfer.offline.facts.document import Table, as_text
from vllm_adainfer.offline.pretrained import load_model
from vllm_adainfer.offline.reports.views import View, decided_by, views_of_prompts


@dataclass(frozen=True)
class Explanation:
    """A policy's view of one prompt, at each exit point and at full depth.

    The request runs `leaves_after` of the layers. `served` are the prompts that the policy serves,
    in words, if this is none of them.
    """

    prompt_tokens: int
    layers: int
    epsilon: float
    leaves_after: int
    views: tuple[View, ...]
    served: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values; scores and thresholds that are not finite, which JSON lacks, are None."""
        plain = asdict(self)
        for view in plain["views"]:
            for name in "score", "threshold":
                if view[name] is not None and not math.isfinite(view[name]):
                    view[name] = None
        return plain

    def __str__(self) -> str:
        """A table for a terminal, and its conclusion."""
        rows = [
            {**view.facts, "": "exits" if view.layer == self.leaves_after else ""}
            for view in self.views
        ]
        return as_text([Table(rows, text_columns=1), self._conclusion()])

    def _conclusion(self) -> str:
        if self.served is not None:
            return (
                f"It runs all {self.layers} layers and answers {self.views[-1].answer}: the policy "
                f"serves prompts {self.served}, and this one does not."
            )
        early = next(view for view in self.views if view.layer == self.leaves_after)
        full, at = self.views[-1], f"at epsilon {self.epsilon:g}"
        if early is full:
            return f"No exit {at}: it runs all {self.layers} layers and answers {full.answer}."
        same = "the same as" if early.answer == full.answer else f"not {full.answer} as"
        where = f"after {early.layer} of {self.layers} layers"
        if early.layer == 0:
            where = f"before the first of {self.layers} layers"
        return f"It exits {where} {at} and answers {early.answer}, {same} at full depth."


def explain(
    text: str,
    path: str,
    source: str,
    template: str | None = None,
    epsilon: float | None = None,
    adapter: NamedAdapter | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
) -> Explanation:
    """Run a prompt at full depth, and look at its states as the policy would.

    The arguments are those of the command line: `path` is of the model, `source` of the artifact.
    An AdaInferError if these and the prompt do not fit together.
    """
    artifact = load_artifact(source)
    config = artifact.config
    schema, tokens = None, 1
    if config.objects is not None:
        tokens, schema = (
            longest_object(config.objects),
            served_schema(config.objects, load_details(source)),
        )
    model = load_model(path, config, adapter, hf_overrides)
    template = read_template(template)
    row = Row("the text", {"text" if template is not None else "prompt": text})
    longest = model.longest_prompt(tokens)
    [example] = make_examples([row], model.tokenizer, template, "label", longest)
    example = replace(example, schema=schema)
    part, row_of_thresholds, bound = decided_by(artifact, epsilon, example.token_ids)
    [views] = views_of_prompts(source, artifact, model, [(example, part, row_of_thresholds)])
    leaves_after, served = next(view.layer for view in views if view.settled), None
    if not config.shared.are_in(example.token_ids):
        served = served_prompts(config.shared, model.tokenizer.decode)
        leaves_after = config.layers
    prompt = len(example.token_ids)
    return Explanation(prompt, config.layers, bound, leaves_after, tuple(views), served)
