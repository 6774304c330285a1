"""Small calibrations: rows whose answers are known, and what policies are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import Head, Norm, normed
from torch import Tensor

from tests import student
from vllm_adainfer.artifact.fields import Choice, Label, SharedTokens
from vllm_adainfer.artifact.kinds import ProbeKind
from vllm_adainfer.artifact.outputs import (
    AnyOutput,
    Choices,
    DecidedField,
    LabelPool,
    Labels,
    Objects,
    Tokens,
    Value,
)
from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit import cost, students, training
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.probes import (
    Target,
    full_depth_labels,
    full_depth_objects,
)
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import FOLDS, OwnStates, Rows, ServedModel
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.policy.probe import Probe

HIDDEN, VOCAB, DEPTH, PROMPTS = 16, 40, 8, 900
LAYERS = (2, 4, 6)
LABELS = (Label(name="bad", token_id=7), Label(name="good", token_id=3))
LABEL_IDS = torch.tensor([7, 3])
POOL = tuple(Label(name=f"label {token}", token_id=token) for token in (5, 17, 9, 2, 30, 11))
CHOICES = Choices(
    choices=(
        Choice(text="a", token_ids=(3, 9), first_tokens=(3, 8)),
        Choice(text="b", token_ids=(7,), first_tokens=(7, 20, 21)),
        Choice(text="c", token_ids=(30,), first_tokens=(30,)),
    ),
    undecided=(1, 2),
)
# One field has a lone value, and the values of another begin with the same token.
OBJECTS = Objects(
    schema_digest="0" * 64,
    start=(1, 2),
    fields=(
        DecidedField(
            path="mood",
            values=(
                Value(text='"bad"', written=(7, 4)),
                Value(text='"fine"', written=(9, 9, 4)),
                Value(text='"good"', written=(3, 4)),
            ),
            guess=2,
        ),
        DecidedField(path="kind", values=(Value(text='"film"', written=(12, 13, 4)),), guess=0),
        DecidedField(
            path="part.seen",
            values=(Value(text="false", written=(20, 21, 5)), Value(text="true", written=(20, 5))),
            guess=1,
        ),
    ),
)
NORM = Norm("rms", torch.ones(HIDDEN), eps=1e-5)
SPLIT = Split.halves(PROMPTS)
EPSILON = 0.05
HF_CONFIG = SimpleNamespace(
    architectures=["LlamaForCausalLM"], hidden_size=HIDDEN, vocab_size=VOCAB
)


def recording_of(labels: bool, noise: float = 1.0) -> Rows:
    """States that come nearer to the final one from layer to layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    final, head = 2 * normal(PROMPTS, HIDDEN), normal(VOCAB, HIDDEN)
    states = {
        layer: final + noise * (DEPTH - layer) / DEPTH * normal(PROMPTS, HIDDEN) for layer in LAYERS
    }
    moments = {layer: [Moments.zeros(HIDDEN, HIDDEN) for _ in range(FOLDS)] for layer in LAYERS}
    for layer, folds in moments.items():
        for fold, sums in enumerate(folds):
            rows = SPLIT.fit[SPLIT.fit % FOLDS == fold]
            change = final[rows] - states[layer][rows]
            sums.add(states[layer][rows].double(), change.double(), torch.ones(len(rows)))
    model = Probe(
        Head(head[LABEL_IDS] if labels else head),
        token_ids=LABEL_IDS if labels else None,
        norm=NORM,
    )
    return Rows(
        ServedModel(
            DEPTH,
            DEPTH,
            Probe(Head(head), norm=NORM),
            "f" * 16,
            layer_seconds=1e-3,  # so slow that every probe is worth its time
            cut_seconds=1e-6,
        ),
        states=states,
        final=final,
        tokens=model.score(model.readout(final)).top1_id.numpy(),
        prompts=np.arange(PROMPTS),
        computed=np.full(PROMPTS, 20.0),
        moments=moments,
    )


ALL_MASS = 12.0  # added to the labels' scores


def recorded(labels_lead: float = ALL_MASS, ids: Tensor = LABEL_IDS) -> Rows:
    """A recording in which these scores are that much higher, so that they have the mass."""
    recording = recording_of(labels=True, noise=0.4)
    bias = torch.zeros(VOCAB).index_fill(0, ids, labels_lead)
    head = Head(recording.model.logit_lens.head.weight / 4, bias)
    return replace(recording, model=replace(recording.model, logit_lens=Probe(head, norm=NORM)))


def logits_of(recording: Rows) -> Tensor:
    """fp32 [rows, vocabulary], full depth's."""
    lens = recording.model.logit_lens
    logits = lens.readout(recording.final) @ lens.head.weight.T
    return logits if lens.head.bias is None else logits + lens.head.bias


def recording_of_prompts(mean_noise: float, last_noise: float = 1.0, **changes: Any) -> Rows:
    """Means that say as much of the answer as `mean_noise` lets them; also before all layers."""
    plain = recording_of(labels=True, noise=last_noise)
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(PROMPTS, HIDDEN, generator=generator)

    states = {0: noise(), **plain.states}
    means = {layer: normed(plain.final) + mean_noise * noise() for layer in states}
    model = replace(plain.model, **{"pool_seconds": 1e-8, **changes})
    return replace(plain, model=model, states=states, means=means)


def states_that_tell(recording: Any, layers: Sequence[int]) -> OwnStates:
    """Three tokens for each prompt, each of which says what full depth will answer."""
    ends = 3 * np.arange(1, PROMPTS + 1)
    rows = recording.final.repeat_interleave(3, dim=0)
    noise = 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    return OwnStates({layer: rows + noise for layer in layers}, ends - 3, ends)


def random_subsets(rows: int, labels: int = len(POOL)) -> Tensor:
    """bool [rows, labels], two labels or more each."""
    order = torch.rand(rows, labels, generator=torch.Generator().manual_seed(0)).argsort(1)
    sizes = torch.randint(2, labels + 1, (rows, 1), generator=torch.Generator().manual_seed(1))
    return order < sizes


def calibration_of(
    rows: Rows,
    kind: ProbeKind = "label-head",
    labels: Sequence[Label] = LABELS,
    *,
    subsets: Tensor | None = None,
    choices: Choices | None = None,
    split: Split = SPLIT,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Calibration:
    """What a policy for `labels` is made from; `given` are other fields of the calibration."""
    asked = PolicyOptions(**{"epsilon": EPSILON, **options})
    ids = torch.tensor([label.token_id for label in labels]) if labels else None
    reads = full_depth_labels(rows, ids, subsets) if asked.promise.reads_probabilities else None
    target = Target(
        kind,
        ids,
        reads,
        subsets,
        first_tokens=None if choices is None else FirstTokens.of(choices),
        promise=asked.promise.about([label.name for label in labels]),
        never_early=frozenset(o.token_id for o in labels if o.name in asked.never_early),
    )
    more = {"pooled_from": 3 if target.is_pooled else None, **(given or {})}
    output: AnyOutput = Tokens(candidates="full" if ids is None else "shortlist")
    if labels:
        kind_of_labels = Labels if subsets is None else LabelPool
        output = choices or kind_of_labels(labels=tuple(labels))
    return Calibration(rows, target, split, asked, output, **more)


def of_pool(**options: Any) -> Calibration:
    """Requests about some of the labels each, which ask three questions in turn."""
    ids = torch.tensor([label.token_id for label in POOL])
    recording, subsets = recorded(ids=ids), random_subsets(PROMPTS)
    own = logits_of(recording)[:, ids].masked_fill(~subsets, -torch.inf)
    recording = replace(recording, tokens=ids[own.argmax(1)].numpy())
    given = {"questions": [f"question {row % 3}" for row in range(PROMPTS)]}
    return calibration_of(recording, labels=POOL, subsets=subsets, given=given, **options)


def of_choices(choices: Choices = CHOICES, **options: Any) -> Calibration:
    """Requests that choose from texts, answered with a first token."""
    recording = recording_of(labels=False, noise=0.2)
    first = FirstTokens.of(choices)
    lens = recording.model.logit_lens.of_tokens(first.token_ids)
    best = lens.score(lens.readout(recording.final)).top1_id.numpy()
    ids = np.array([one.token_id for one in choices.labels])
    recording = replace(recording, tokens=ids[first.labels_of(best)])
    options = {"exit_points": LAYERS, **options}
    return calibration_of(recording, labels=choices.labels, choices=choices, **options)


def recording_of_objects(noise: float = 0.4) -> Rows:
    """States at the row of each field, which come nearer to the final one from layer to layer.

    In one object of ten another mood is written than at the row behind the guess, and the values
    are as probable as there in turn.
    """
    plain, sizes = recording_of(labels=False), OBJECTS.link.sizes
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    final = 2 * normal(PROMPTS, len(sizes), HIDDEN)
    lens, values = plain.model.logit_lens, []
    for field, tokens in enumerate(([7, 9, 3], [12], [20, 22])):  # the likeliest says what it has
        logits = lens.readout(final[:, field]) @ lens.head.weight[tokens].T
        values.append(logits.softmax(dim=1))
    another = torch.rand(PROMPTS, generator=generator) < 0.1
    values[0][another] = values[0][another].roll(1, dims=1)
    places = torch.stack([one.argmax(dim=1) for one in values], dim=1)
    states = {
        layer: final + noise * (DEPTH - layer) / DEPTH * normal(*final.shape) for layer in LAYERS
    }
    mean = normed(final.flatten(0, 1)).view(final.shape).mean(dim=1)
    means = {layer: mean + noise * normal(PROMPTS, HIDDEN) for layer in states}
    return replace(
        plain,
        model=replace(plain.model, pool_seconds=1e-8),
        states=states,
        final=final,
        tokens=OBJECTS.link.code(places).numpy(),
        moments={},
        means=means,
        values=torch.cat(values, dim=1),
    )


def of_objects(
    rows: Rows | None = None, kind: ProbeKind = "label-head", **options: Any
) -> Calibration:
    """Requests for objects, each field of which is read at a row of its own."""
    asked = PolicyOptions(**{"epsilon": EPSILON, **options})
    names = [label.name for label in OBJECTS.labels]
    found = recording_of_objects() if rows is None else rows
    target = Target(
        kind,
        torch.arange(len(names)),
        full_depth_objects(found) if asked.promise.reads_probabilities else None,
        promise=asked.promise.about(names, OBJECTS.link),
        never_early=frozenset(names.index(one) for one in asked.never_early),
        objects=OBJECTS,
    )
    pooled_from = 3 if target.is_pooled else None
    return Calibration(found, target, SPLIT, asked, OBJECTS, pooled_from=pooled_from)


def of_prompts(rows: Rows, **options: Any) -> Calibration:
    """Heads that read prompts as a whole."""
    return calibration_of(rows, "pooled-label-head", **options)


HINTS = (101, 202, 110, 120, 130, 140)  # a word for each answer


def base_of(
    recording: Any, unreadable: int = 0, answers: Sequence[int] = LABEL_IDS.tolist()
) -> StudentBase:
    """An encoder, and texts of which six in ten have the word that gives the answer away."""
    generator = np.random.default_rng(0)
    texts = []
    for token in recording.tokens.tolist():
        text = generator.integers(400, 900, 6)
        if generator.random() < 0.6:
            text[2] = HINTS[answers.index(token)]
        texts.append(tuple(text.tolist()))
    if unreadable:
        texts[-unreadable:] = [()] * unreadable
    described = student.described(SharedTokens())
    return StudentBase(described, student.bert(), student.tokenizer(), texts)


def cheap_probes_that_learn_fast(patch: pytest.MonkeyPatch) -> None:
    """An encoder of random weights has more to learn than one that knows the language."""
    patch.setattr(cost, "probe_seconds", lambda *_: 1e-6)
    patch.setattr(cost, "trained_seconds", lambda *_: 1e-6)
    patch.setattr(students, "STUDENT_LEARNING_RATE", 1e-2)
    patch.setattr(training, "HEAD_LEARNING_RATE", 1e-2)
    patch.setattr(students, "STUDENT_EPOCHS", 6)
    patch.setattr(students, "STUDENT_BATCH", 16)  # twice as many steps
