"""Label pools: each request is about labels of its own, in calibration as in service."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import Head
from vllm import SamplingParams

from tests.admitted import admitted, row_of
from tests.tiny import tiny_artifact, tiny_config, word_tokenizer
from tests.unit.readings import views_as_it_decides, wrong_of
from tests.unit.test_calibrate_probabilities import ALL_MASS, logits_of, recorded
from tests.unit.test_make_policy import HF_CONFIG, NORM, SPLIT, VOCAB
from vllm_adainfer.artifact.fields import Gate, Label
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.artifact.label_subsets import ALL, bits_of, mask_of
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.label_pool import common_labels, pool_of, subsets_of
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.probes import Target, fit_probes, full_depth_labels
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, make_policy
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import FOLDS
from vllm_adainfer.offline.calibration.write.policy_artifact import (
    never_named,
    policy_config,
    policy_tensors,
    question_rows,
)
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.kinds import asked_for
from vllm_adainfer.settings.engine import Settings

EPSILON, TOLERANCE = 0.05, 0.1
BEST = Gate(probability=0.6)
POOL = torch.tensor([5, 17, 9, 2, 30, 11])
LABELS = tuple(Label(name=f"label {token}", token_id=token) for token in POOL.tolist())


def random_subsets(rows: int, seed: int = 0) -> torch.Tensor:
    """bool [rows, labels], two labels or more each."""
    order = torch.rand(rows, len(POOL), generator=torch.Generator().manual_seed(seed)).argsort(1)
    sizes = torch.randint(2, len(POOL) + 1, (rows, 1), generator=torch.Generator().manual_seed(1))
    return order < sizes


def calibrated(risk: str, with_mass: bool, **options: Any) -> tuple[FittedPolicy, torch.Tensor]:
    recording = recorded()
    bias = torch.zeros(VOCAB).index_fill(0, POOL, ALL_MASS)
    head = Head(recording.model.logit_lens.head.weight, bias)
    model = replace(recording.model, logit_lens=Probe(head, norm=NORM))
    recording = replace(recording, model=model)
    subsets = random_subsets(len(recording.tokens))
    logits = logits_of(recording)
    own = logits[:, POOL].masked_fill(~subsets, -torch.inf)
    recording = replace(recording, tokens=POOL[own.argmax(1)].numpy())
    reads = full_depth_labels(recording, POOL, subsets) if risk == "probability" else None
    asked = {"epsilon": EPSILON, "risk": risk, **options}
    if risk == "probability" and "gates" not in options:
        asked["tolerance"] = TOLERANCE
    promise = asked_for(PolicyOptions(**asked), LABELS, label_mass=with_mass)
    never = frozenset(one.token_id for one in LABELS if one.name in options.get("never_early", ()))
    target = Target("label-head", POOL, reads, subsets, promise=promise, never_early=never)
    questions = [f"question {row % 3}" for row in range(len(recording.tokens))]
    calibration = Calibration(
        recording,
        target,
        SPLIT,
        PolicyOptions(**asked),
        LABELS,
        questions=questions,
    )
    return make_policy(calibration), logits


@pytest.mark.parametrize("classifier", ["svm", "crf"])
@pytest.mark.parametrize("never", [(), ("label 17", "label 2")], ids=["", "never early"])
@pytest.mark.parametrize(
    ("risk", "with_mass", "gates"),
    [
        ("disagreement", False, {}),
        ("probability", False, {}),
        ("probability", True, {}),
        ("probability", False, {"gates": (Gate(label="label 9", probability=0.4), BEST)}),
    ],
)
def test_what_is_served_of_a_pool_is_what_was_certified(
    tmp_path, risk, with_mass, gates, never, classifier
):
    policy, logits = calibrated(risk, with_mass, classifier=classifier, never_early=never, **gates)
    config = policy_config(policy, "tiny", HF_CONFIG)
    assert config.label_pool
    save_artifact(tmp_path / "policy", config, policy_tensors(policy), {}, "card")
    artifact = load_artifact(str(tmp_path / "policy"))
    serving = Policy(artifact, torch.device("cpu"))
    recording, rows = policy.calibration.rows, SPLIT.certify
    subsets = policy.calibration.target.subsets[rows]
    bits = torch.tensor([bits_of(set(POOL[own].tolist()), POOL.tolist()) for own in subsets])
    tags = torch.full((len(rows),), artifact.config.level_of(None))
    exits, wrong = np.full(len(rows), len(policy.exits)), np.zeros(len(rows))
    memory = None
    for index, layer in enumerate(serving.exit_points):
        undecided = UndecidedRows(recording.states[layer][rows], tags, memory, bits)
        decision = serving.decide(index, undecided)
        assert views_as_it_decides(serving, index, undecided, decision)
        leaves = (exits == len(policy.exits)) & decision.settled.numpy()
        exits[leaves] = index
        assert not decision.answers.scores.isfinite()[~subsets].any()
        best = decision.answers.scores.argmax(dim=1).numpy()
        assert not {LABELS[place].name for place in best[leaves]} & set(never)
        if risk == "probability":
            early = wrong_of(serving, decision.answers, logits[rows]).numpy()
        else:
            early = POOL[decision.answers.scores.argmax(1)].numpy() != recording.tokens[rows]
        wrong[leaves] = early[leaves]
        memory = decision.memory
    point = policy.points[EPSILON]
    assert np.array_equal(exits, point.exits)
    assert np.array_equal(wrong, point.losses)
    assert len(set(exits.tolist())) > 1


def test_labels_that_no_request_names_do_not_change_how_others_are_read():
    policy, _ = calibrated("disagreement", False)
    calibration = policy.calibration
    target = calibration.target
    more = torch.tensor([3, 21, 33])
    none = torch.zeros(len(target.subsets), len(more), dtype=torch.bool)
    wider = replace(
        target,
        label_ids=torch.cat([POOL, more]),
        subsets=torch.cat([target.subsets, none], dim=1),
    )
    rows = SPLIT.fit
    for layer, states in calibration.rows.states.items():
        narrow_head, _ = fit_probes(calibration.rows, target, rows, layer, rows % FOLDS)
        wide_head, _ = fit_probes(calibration.rows, wider, rows, layer, rows % FOLDS)
        narrow, wide = (
            head.label_scores(states)[:, : len(POOL)] for head in (narrow_head, wide_head)
        )
        torch.testing.assert_close(wide - wide[:, :1], narrow - narrow[:, :1], atol=1e-4, rtol=1e-4)
    labels = (*LABELS, *(Label(name=f"unused {t}", token_id=t) for t in more.tolist()))
    unused = replace(calibration, target=wider, labels=labels)
    assert never_named(unused) == ["unused 3", "unused 21", "unused 33"]
    assert never_named(calibration) == []


def test_a_mixture_says_what_each_question_saves_and_risks():
    policy, _ = calibrated("disagreement", False)
    point = policy.points[EPSILON]
    rows = question_rows(policy, point)
    total = sum(row["prompts"] for row in rows)
    assert [row["question"] for row in rows] == ["question 0", "question 1", "question 2"]
    assert total == len(SPLIT.certify)
    for name, mean in (("risk", point.risk), ("layers_saved", point.layers_saved)):
        assert sum(row["prompts"] * row[name] for row in rows) / total == pytest.approx(mean)


def test_bits_and_masks_say_the_same():
    ids, columns = POOL.tolist(), torch.arange(len(POOL))
    assert mask_of(torch.tensor([ALL]), columns).all()
    for subset in random_subsets(50):
        asked = {token for token, named in zip(ids, subset, strict=True) if named}
        bits = bits_of([*asked, 999], ids)
        assert torch.equal(mask_of(torch.tensor([bits]), columns)[0], subset)


PROBABILITIES = {"risk": "probability", "tolerance": 0.05, "label_mass": True}
NAMES = ("a", "b", "c", "d")
FOUR = tuple(Label(name=name, token_id=10 + place) for place, name in enumerate(NAMES))


@pytest.fixture
def admission(tiny_model, tmp_path):
    """Two pools of the same four labels, for tokens and for probabilities, and two exact labels."""

    def make(*names: str) -> Admission:
        pool = {"labels": FOUR, "label_pool": True}
        kinds = {
            "tokens": pool,
            "probabilities": {**pool, **PROBABILITIES},
            "two": {"labels": FOUR[:2]},
            "other": {"labels": FOUR[1:], "label_pool": True},
        }
        return Admission(
            Settings(
                artifact={
                    name: str(tiny_artifact(tiny_model, tmp_path / name, **kinds[name]))
                    for name in names
                }
            )
        )

    return make


def request(**more: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 1, **more})


@pytest.mark.parametrize(
    ("asked", "policy", "bits"),
    [
        ({"allowed_token_ids": [10, 11]}, "two", ALL),
        ({"allowed_token_ids": [12, 10]}, "tokens", 0b101),
        ({"allowed_token_ids": [13, 12, 11, 10]}, "tokens", 0b1111),
        ({"allowed_token_ids": [10]}, None, ALL),
        ({"allowed_token_ids": [10, 14]}, None, ALL),
        ({"logprob_token_ids": [13, 11]}, "probabilities", 0b1010),
        ({"logprob_token_ids": [10, 11]}, "probabilities", 0b11),
        ({"logprob_token_ids": [10, 99]}, None, ALL),
        ({}, None, ALL),
    ],
)
def test_a_request_goes_to_the_policy_with_exactly_its_labels_before_a_pool(
    admission, asked, policy, bits
):
    deciding = admission("two", "tokens", "probabilities")
    params = request(**asked)
    owner = {None: None, "two": 0, "tokens": 1, "probabilities": 2}[policy]
    tag = row_of(deciding, params)
    assert (None if tag == FULL_DEPTH else tag // 2) == owner
    assert admitted(deciding, params).subset == (ALL if policy == "two" else bits)
    assert deciding.policies.ambiguous == []


def test_two_pools_that_share_labels_are_told_apart_by_name_alone(admission):
    deciding = admission("tokens", "other")
    assert deciding.policies.ambiguous == [["tokens", "other"]]
    params = request(allowed_token_ids=[11, 12])
    assert row_of(deciding, params) == FULL_DEPTH
    named = request(allowed_token_ids=[11, 12], extra_args={"adainfer_policy": "other"})
    assert (row_of(deciding, named) // 2, admitted(deciding, named).subset) == (1, 0b11)
    assert row_of(deciding, request(allowed_token_ids=[10, 12])) // 2 == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"label_pool": True, "probe": "lens"}, "label_pool and choices need a label-head"),
        (
            {
                "label_pool": True,
                "labels": tuple(Label(name=str(i), token_id=i) for i in range(63)),
            },
            "at most 62 labels",
        ),
    ],
)
def test_a_pool_that_cannot_be_served_is_refused(tiny_model, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_config(tiny_model, **changes)


def example(labels: tuple[int, ...], text: str = "a good one :") -> Example:
    return Example("here, line 1", text, [1], None, labels, question="q")


def test_pools_are_named_or_token_ids_and_hold_every_label_that_is_asked_for():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["yes", "no", "film"])
    yes, no, film = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no", "film"))
    examples = [example((yes, no)), example((no, film))]
    found = pool_of(["yes-no", str(film)], examples, tokenizer)
    assert [label.token_id for label in found] == [yes, no, film]
    assert [label.name for label in found] == ["yes", "no", "film"]
    assert subsets_of(examples, [yes, no, film]).tolist() == [
        [True, True, False],
        [False, True, True],
    ]
    with pytest.raises(AdaInferError, match=r"'film'.*does not have: add it"):
        pool_of(["yes-no"], examples, tokenizer)
    with pytest.raises(AdaInferError, match="--label-pool moods is not known"):
        pool_of(["moods"], examples, tokenizer)
    with pytest.raises(AdaInferError, match="--label-pool 99999 is no token id of this model"):
        pool_of(["99999"], examples, tokenizer)
    with pytest.raises(AdaInferError, match="both begin with the token '<unk>'"):
        pool_of(["letters"], examples, tokenizer)
    with pytest.raises(AdaInferError, match="two to 62"):
        pool_of([str(yes)], examples[:0], tokenizer)
    with pytest.raises(AdaInferError, match=r"2 different sets of labels: give --label-pool"):
        common_labels(examples, tokenizer)
    assert [label.token_id for label in common_labels(examples[:1], tokenizer)] == [yes, no]
