"""Label pools: each request is about labels of its own, in calibration as in service."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vllm import SamplingParams

from tests.admitted import admitted, row_of
from tests.calibrations import EPSILON, POOL, SPLIT, of_pool, random_subsets
from tests.tiny import tiny_artifact, word_tokenizer
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.artifact.outputs import LabelPool
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.label_pool import common_labels, pool_of, subsets_of
from vllm_adainfer.offline.calibration.fit.probes import fit_probes
from vllm_adainfer.offline.calibration.fit_policy import make_policy
from vllm_adainfer.offline.calibration.record.rows import FOLDS
from vllm_adainfer.offline.calibration.write.policy_artifact import (
    never_named,
    question_rows,
)
from vllm_adainfer.promise.label_subsets import ALL, bits_of, mask_of
from vllm_adainfer.settings.engine import Settings


def test_labels_that_no_request_names_do_not_change_how_others_are_read():
    calibration = of_pool()
    target = calibration.target
    more = torch.tensor([3, 21, 33])
    none = torch.zeros(len(target.subsets), len(more), dtype=torch.bool)
    wider = replace(
        target,
        label_ids=torch.cat([target.label_ids, more]),
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
    labels = (*POOL, *(Label(name=f"unused {t}", token_id=t) for t in more.tolist()))
    unused = replace(calibration, target=wider, output=LabelPool(labels=labels))
    assert never_named(unused) == ["unused 3", "unused 21", "unused 33"]
    assert never_named(calibration) == []


def test_a_mixture_says_what_each_question_saves_and_risks():
    policy = make_policy(of_pool())
    point = policy.points[EPSILON]
    rows = question_rows(policy, point)
    total = sum(row["prompts"] for row in rows)
    assert [row["question"] for row in rows] == ["question 0", "question 1", "question 2"]
    assert total == len(SPLIT.certify)
    for name, mean in (("risk", point.risk), ("layers_saved", point.layers_saved)):
        assert sum(row["prompts"] * row[name] for row in rows) / total == pytest.approx(mean)


def test_bits_and_masks_say_the_same():
    ids, columns = [one.token_id for one in POOL], torch.arange(len(POOL))
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
