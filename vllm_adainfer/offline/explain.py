"""Explain: what a policy sees of one prompt, exit point by exit point, and where it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from adainfer_kernels import Head
from torch import Tensor

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.adapter import NamedAdapter, adapter_for
from vllm_adainfer.offline.calibration.collect import Recording, record, recording_engine
from vllm_adainfer.offline.calibration.data import Row, make_examples, read_template
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.tables import text_table
from vllm_adainfer.policy.artifact import Artifact, ArtifactConfig
from vllm_adainfer.policy.artifact_files import load_artifact
from vllm_adainfer.policy.exit_policy import Asked
from vllm_adainfer.policy.label_subsets import ALL
from vllm_adainfer.policy.load_policy import policy_of
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.questions import KnownQuestions
from vllm_adainfer.policy.reading import features_among


@dataclass(frozen=True)
class ExplainRequest:
    """The command line's arguments; see `vllm-adainfer explain --help`."""

    text: str
    model: str
    artifact: str
    template: str | None = None
    epsilon: float | None = None
    adapter: NamedAdapter | None = None


@dataclass(frozen=True)
class View:
    """The answer as it looks after some layers.

    Attributes:
        layer: how many layers have run.
        answer: what would be answered.
        top_prob: its probability among the tokens that are scored.
        gap: its lead over the second.
        score: log odds that the answer is final; None at full depth.
        threshold: of the score; None at full depth.
        settled: whether the policy settles the request here.

    """

    layer: int
    answer: str
    top_prob: float
    gap: float
    score: float | None = None
    threshold: float | None = None
    settled: bool = True


@dataclass(frozen=True)
class Explanation:
    """What the policy makes of one prompt.

    Attributes:
        prompt_tokens: of the prompt.
        layers: of the model.
        epsilon: the bound that the thresholds are for.
        leaves_after: layers that the request runs.
        views: by exit point; the last one is at full depth.

    """

    prompt_tokens: int
    layers: int
    epsilon: float
    leaves_after: int
    views: tuple[View, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; a score or a threshold that is not finite, which JSON lacks, is None."""
        plain = asdict(self)
        for view in plain["views"]:
            for name in "score", "threshold":
                if view[name] is not None and not math.isfinite(view[name]):
                    view[name] = None
        return plain

    def __str__(self) -> str:
        """A table for a terminal, and what follows from it."""
        columns = ["answer", "after layer", "top_prob", "gap", "score", "threshold", ""]
        rows = [
            [
                view.answer,
                str(view.layer),
                f"{view.top_prob:.3f}",
                f"{view.gap:.3f}",
                _number(view.score),
                _number(view.threshold),
                "leaves" if view.layer == self.leaves_after else "",
            ]
            for view in self.views
        ]
        return f"{text_table(columns, rows, text_columns=1)}\n\n{self._in_words()}"

    def _in_words(self) -> str:
        left = next(view for view in self.views if view.layer == self.leaves_after)
        full = self.views[-1]
        if left is full:
            return (
                f"The policy never settles it at epsilon {self.epsilon:g}: it runs all "
                f"{self.layers} layers and answers {full.answer}."
            )
        same = "as at full depth" if left.answer == full.answer else f"at full depth {full.answer}"
        return (
            f"It leaves after {left.layer} of {self.layers} layers, at epsilon {self.epsilon:g}, "
            f"and answers {left.answer}, {same}."
        )


def explain(request: ExplainRequest) -> Explanation:
    """Run a prompt at full depth, and look at it as the policy does.

    Raises:
        AdaInferError: model, artifact and prompt do not fit together.

    """
    artifact = load_artifact(request.artifact)
    config = artifact.config
    adapter = adapter_for(config, request.adapter)
    hf_config, tokenizer = load_config_and_tokenizer(request.model)
    config.check_served_by(hf_config)
    template = read_template(request.template)
    row = Row("the text", {"text" if template is not None else "prompt": request.text})
    longest = hf_config.max_position_embeddings - 1
    [example] = make_examples([row], tokenizer, template, "label", longest)
    tag, epsilon = _tag(config, request.epsilon, example.token_ids)
    settings = {"enforce_eager": True, **({} if adapter is None else adapter.engine_settings)}
    with recording_engine(
        request.model, hf_config, [example], config.exit_points, **settings
    ) as engine:
        recording = record(
            engine,
            [example],
            config.label_ids,
            config.exit_points,
            adapter=adapter and adapter.request,
        )
    config.check_weights(recording.fingerprint)
    names = {label.token_id: label.name for label in config.labels}

    def named(token: int) -> str:
        return repr(names.get(token) or tokenizer.decode([token]))

    views = _views(artifact, recording, tag, named)
    leaves_after = next(view.layer for view in views if view.settled)
    return Explanation(len(example.token_ids), config.layers, epsilon, leaves_after, tuple(views))


def _tag(config: ArtifactConfig, epsilon: float | None, prompt: Sequence[int]) -> tuple[int, float]:
    """The row of thresholds for a prompt, and the bound that it is for.

    Raises:
        AdaInferError: the policy lets such a prompt leave nowhere.

    """
    level = config.level_of(epsilon)
    if level < 0:
        raise AdaInferError("at epsilon 0 nothing leaves: ask for a bound of the artifact's table")
    question = KnownQuestions(one.ends for one in config.questions).asked_by(prompt)
    tag = config.tag_of(level, question)
    if tag is None:
        raise AdaInferError(
            "the policy is certified for each question on its own, and not for the one that this "
            "prompt asks: it runs all layers"
        )
    return tag, config.levels[level].epsilon


def _views(
    artifact: Artifact, recording: Recording, tag: int, named: Callable[[int], str]
) -> list[View]:
    def logit_lens(head_rows: Tensor | None) -> Probe:
        lens = recording.logit_lens
        return lens if head_rows is None else replace(lens, head=Head(head_rows))

    policy = policy_of(artifact, torch.device("cpu"), logit_lens)
    tags, memory, views = torch.tensor([tag]), None, []
    for index, layer in enumerate(policy.exit_points):
        asked = Asked(recording.states[layer], tags, memory, torch.tensor([ALL]))
        read, decision = policy.read(index, asked), policy.decide(index, asked)
        memory = decision.memory
        views.append(
            View(
                layer,
                named(int(read.tokens)),
                float(read.top_prob),
                float(read.gap),
                float(read.odds),
                float(read.threshold),
                bool(decision.settled),
            )
        )
    top_prob, gap = _at_full_depth(artifact.config, recording)
    return [*views, View(recording.depth, named(int(recording.tokens[0])), top_prob, gap)]


def _at_full_depth(config: ArtifactConfig, recording: Recording) -> tuple[float, float]:
    """``top_prob`` and ``gap`` of the model's own scores."""
    lens = recording.logit_lens
    if config.label_ids:
        lens = lens.of_tokens(torch.tensor(config.label_ids))
    scores = lens.score(lens.readout(recording.final), return_scores=True).scores
    assert scores is not None
    if recording.soft_cap is not None:
        scores = torch.tanh(scores / recording.soft_cap) * recording.soft_cap
    top_prob, gap = features_among(scores * recording.scale)[0].tolist()
    return top_prob, gap


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
