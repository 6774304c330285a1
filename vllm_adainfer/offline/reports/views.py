"""Views: what a policy sees of a prompt, exit point by exit point, from recorded states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from adainfer_kernels import Head
from torch import Tensor

from vllm_adainfer.artifact.config import Artifact, ArtifactConfig
from vllm_adainfer.artifact.label_subsets import ALL
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.collect import Recording
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.load_policy import policy_of
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.questions import KnownQuestions
from vllm_adainfer.policy.reading import features_among


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


def tag_at(
    config: ArtifactConfig, epsilon: float | None, prompt: Sequence[int]
) -> tuple[int, float]:
    """The row of thresholds for a prompt, and the bound that it is for.

    Raises:
        AdaInferError: the policy lets such a prompt leave nowhere.

    """
    level = config.level_of(epsilon)
    if level < 0:
        raise AdaInferError("at epsilon 0 nothing leaves: ask for a bound of the artifact's table")
    question = KnownQuestions(one.ends for one in config.questions).asked_by(prompt)
    tag = config.threshold_row(level, question)
    if tag is None:
        raise AdaInferError(
            "the policy is certified for each question on its own, and not for the one that this "
            "prompt asks: it runs all layers"
        )
    return tag, config.levels[level].epsilon


def views_of(
    artifact: Artifact,
    recording: Recording,
    row: int,
    tag: int,
    named: Callable[[int], str],
    subset: int = ALL,
) -> list[View]:
    """The views of one prompt.

    Args:
        artifact: with its tensors.
        recording: of this prompt and perhaps others, after the artifact's exit points.
        row: of the recording.
        tag: the row of the artifact's thresholds, see `tag_at`.
        named: a token in words.
        subset: the labels that the prompt is about, as bits.

    """

    def logit_lens(head_rows: Tensor | None) -> Probe:
        lens = recording.logit_lens
        return lens if head_rows is None else replace(lens, head=Head(head_rows))

    policy = policy_of(artifact, torch.device("cpu"), logit_lens)
    tags, memory, views = torch.tensor([tag]), None, []
    for index, layer in enumerate(policy.exit_points):
        undecided = UndecidedRows(
            recording.states[layer][[row]], tags, memory, torch.tensor([subset])
        )
        seen, decision = policy.view(index, undecided), policy.decide(index, undecided)
        memory = decision.memory
        views.append(
            View(
                layer,
                named(int(seen.tokens)),
                float(seen.top_prob),
                float(seen.gap),
                float(seen.odds),
                float(seen.threshold),
                bool(decision.settled),
            )
        )
    top_prob, gap = _at_full_depth(artifact.config, recording, row)
    return [*views, View(recording.depth, named(int(recording.tokens[row])), top_prob, gap)]


def _at_full_depth(config: ArtifactConfig, recording: Recording, row: int) -> tuple[float, float]:
    """``top_prob`` and ``gap`` of the model's own scores."""
    lens = recording.logit_lens
    if config.label_ids:
        lens = lens.of_tokens(torch.tensor(config.label_ids))
    scores = lens.score(lens.readout(recording.final[[row]]), return_scores=True).scores
    assert scores is not None
    if recording.soft_cap is not None:
        scores = torch.tanh(scores / recording.soft_cap) * recording.soft_cap
    top_prob, gap = features_among(scores * recording.scale)[0].tolist()
    return top_prob, gap
