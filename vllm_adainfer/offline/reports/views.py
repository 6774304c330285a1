"""A policy's view of a prompt, exit point by exit point, from recorded states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from adainfer_kernels import Head
from torch import Tensor

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_student_tokenizer
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.objects import Schema
from vllm_adainfer.offline.calibration.data.served_schema import in_words
from vllm_adainfer.offline.calibration.record.collect import Plan, recorded
from vllm_adainfer.offline.calibration.record.objects import recorded_objects
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.facts.document import Facts
from vllm_adainfer.offline.pretrained import Model
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.guesser import Guesser
from vllm_adainfer.policy.own_text import text_reader
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.questions import asked_among
from vllm_adainfer.promise.label_subsets import ALL, bits_of
from vllm_adainfer.promise.probabilities import features_among


@dataclass(frozen=True)
class View:
    """A policy's view of a prompt after some layers.

    Attributes:
        layer: number of layers that have run.
        answer: the answer if the request exited here.
        least_sure: of an object, the field that is least sure; None for other answers.
        top_prob: the answer's probability among the scored tokens.
        gap: the answer's lead over the second token, in probability.
        score: log odds that the answer is final; None at full depth.
        threshold: the score at which a request exits; None at full depth.
        settled: whether the request exits here.

    """

    layer: int
    answer: str
    top_prob: float
    gap: float
    score: float | None = None
    threshold: float | None = None
    settled: bool = True
    least_sure: str | None = None

    @property
    def facts(self) -> Facts:
        """The cells of a table, by their headings."""
        return {
            "answer": self.answer,
            "after layer": str(self.layer),
            **({} if self.least_sure is None else {"least sure": self.least_sure}),
            "top_prob": f"{self.top_prob:.3f}",
            "gap": f"{self.gap:.3f}",
            "score": "" if self.score is None else f"{self.score:.2f}",
            "threshold": "" if self.threshold is None else f"{self.threshold:.2f}",
        }


def record_prompts(model: Model, artifact: Artifact, examples: Sequence[Example]) -> Rows:
    """Run `examples` at full depth in an engine of their own, and record what a policy reads.

    An AdaInferError if it does not start, or its weights are not those of the policy.
    """
    config = artifact.config
    plan = Plan(
        config.all_exit_points,
        config.label_ids,
        pooled_from=config.pooled_from,
        branches=config.branches,
    )
    settings = {"enforce_eager": True, **model.engine_settings}
    path, hf_config, adapter = model.path, model.hf_config, model.lora_request
    if config.objects is None:
        rows = recorded(path, hf_config, examples, plan, adapter, **settings)
    else:
        assert examples[0].schema is not None, "prompts for objects have one"
        schema = Schema.of(examples[0].schema, examples[0].place)
        guesser, tokenizer = Guesser.of(artifact), model.tokenizer
        rows, _ = recorded_objects(
            path, hf_config, examples, plan, schema, tokenizer, guesser, adapter, **settings
        )
    config.check_options(rows.model.engine_options)
    config.check_weights(rows.model.fingerprint)
    return rows


def token_namer(config: ArtifactConfig, tokenizer: Any) -> Callable[[int], str]:
    """A function that returns a token's label, or its text, in quotes; of objects, their values."""
    if (objects := config.objects) is not None:
        return partial(in_words, objects)
    names = {label.token_id: label.name for label in config.labels}
    return lambda token: repr(names.get(token) or tokenizer.decode([token]))


def decided_by(
    artifact: Artifact, epsilon: float | None, prompt: Sequence[int]
) -> tuple[Artifact, int, float]:
    """The part of a policy that decides a prompt, its row of thresholds, and the certified bound.

    No token of `prompt` is in the prefix cache; `epsilon` None is the artifact's own. An
    AdaInferError if such a prompt never exits.
    """
    part, *last_token = artifact.parts("").values()
    pooled_from = artifact.config.pooled_from
    if pooled_from is not None and len(prompt) <= pooled_from:
        if not last_token:
            raise AdaInferError(
                f"the policy reads the tokens of a prompt after the first {pooled_from}, and this "
                "prompt, which has no more, runs all layers"
            )
        [part] = last_token
    config = part.config
    level = config.level_of(epsilon)
    if level < 0:
        raise AdaInferError("nothing exits at epsilon 0: give a bound of the artifact's table")
    question = asked_among(one.ends for one in config.questions)(prompt)
    row = config.threshold_row(level, question)
    if row is None:
        raise AdaInferError(
            "the policy is certified for each question separately, but not for the question of "
            "this prompt, which runs all layers"
        )
    return part, row, config.levels[level].epsilon


def views_of_prompts(
    source: str,
    artifact: Artifact,
    model: Model,
    asked: Sequence[tuple[Example, Artifact, int]],
) -> list[list[View]]:
    """The views of prompts, which run once more, at full depth.

    `asked` has each prompt with the part of the `artifact`, loaded from `source`, that decides it,
    and its row.
    """
    config = artifact.config
    examples = list({id(example): example for example, _, _ in asked}.values())
    places = {id(example): place for place, example in enumerate(examples)}
    recording, name = (
        record_prompts(model, artifact, examples),
        token_namer(config, model.tokenizer),
    )
    own_text = None
    if config.student is not None:
        decode = partial(model.tokenizer.decode, skip_special_tokens=True)
        tokenizer = load_student_tokenizer(source)
        own_text = text_reader(decode, config.student, config.shared, tokenizer)
    found = []
    for example, part, row in asked:
        subset = ALL
        if config.label_pool and example.labels is not None:
            subset = bits_of(example.labels, config.label_ids)
        text = () if own_text is None else own_text(example.token_ids)
        place = places[id(example)]
        found.append(views_of(part, recording, place, row, name, subset, text))
    return found


def views_of(
    artifact: Artifact,
    recording: Rows,
    prompt: int,
    thresholds: int,
    name: Callable[[int], str],
    subset: int = ALL,
    text: Sequence[int] = (),
) -> list[View]:
    """The views of one prompt: one for each exit point, and one for full depth.

    `recording` has states at the exit points of the part of the `artifact` that decides the prompt.
    `thresholds` is the row of its thresholds, `subset` the labels that it is about, as bits, and
    `text` what the student reads of it, empty if it is not asked.
    """

    def logit_lens(head_rows: Tensor | None) -> Probe:
        lens = recording.model.logit_lens
        return lens if head_rows is None else replace(lens, head=Head(head_rows))

    policy = Policy(artifact, torch.device("cpu"), logit_lens)
    rows, memory, views = torch.tensor([thresholds]), None, []
    objects = artifact.config.objects
    place = np.array([prompt])
    for index, (layer, probe_input) in enumerate(
        zip(policy.exit_points, policy.probe_inputs, strict=True)
    ):
        if probe_input is ProbeInput.TEXT and not text:
            continue
        hidden, lens = recording.states[layer][place], np.arange(0)
        if probe_input is ProbeInput.PROMPT:
            hidden = recording.read_by_probe(layer, place, pooled=True)
        elif probe_input is ProbeInput.OWN_STATES:
            assert recording.own_states is not None
            [states] = recording.own_states.of(layer, place)
            hidden, lens = policy.probes[index].project(states), np.array([len(states)])
        undecided = UndecidedRows(hidden, rows, memory, torch.tensor([subset]), [text], lens)
        seen, decision = policy.view(index, undecided), policy.decide(index, undecided)
        memory = decision.memory
        views.append(
            View(
                layer,
                name(int(seen.tokens)),
                float(seen.top_prob),
                float(seen.gap),
                float(seen.odds),
                float(seen.threshold),
                bool(decision.settled),
                None
                if objects is None or seen.least_sure is None
                else objects.fields[int(seen.least_sure)].path,
            )
        )
    depth, answer = recording.model.depth, name(int(recording.tokens[prompt]))
    if objects is not None:
        link = objects.link
        assert recording.values is not None, "those of objects have them"
        scores = link.scores_of(recording.values[place])
        top_prob, gap = features_among(scores, link)[0].tolist()
        least_sure = objects.fields[int(link.least_sure(scores))].path
        return [*views, View(depth, answer, top_prob, gap, least_sure=least_sure)]
    top_prob, gap = _at_full_depth(artifact.config, recording, prompt)
    return [*views, View(depth, answer, top_prob, gap)]


def _at_full_depth(config: ArtifactConfig, recording: Rows, prompt: int) -> tuple[float, float]:
    """``top_prob`` and ``gap`` of the model's own scores."""
    lens = recording.model.logit_lens
    if config.label_ids:
        lens = lens.of_tokens(torch.tensor(config.label_ids))
    lens = recording.model.as_served(lens)
    scores = lens.score(lens.readout(recording.final[[prompt]]), return_scores=True).scores
    assert scores is not None
    top_prob, gap = features_among(scores)[0].tolist()
    return top_prob, gap
