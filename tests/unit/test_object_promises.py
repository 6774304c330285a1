"""Promises about a value read one field of an object, whatever the others have."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.calibrations import OBJECTS, SPLIT, of_objects
from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify.certify import LabelTest, Terms
from vllm_adainfer.offline.calibration.certify.path import Pair, PathPoint

LINK, ROWS = OBJECTS.link, len(SPLIT.certify)
KINDS = pytest.mark.parametrize("kind", ["recall", "precision"])
VALUES = pytest.mark.parametrize("label", ['mood="fine"', "part.seen=true"])


def drawn(seed: int, changed: float = 0.1) -> tuple[Any, Any]:
    """Objects early and at full depth, of which some differ in some fields."""
    generator = np.random.default_rng(seed)
    full, other = generator.integers(0, 6, (2, ROWS))
    return np.where(generator.random(ROWS) < changed, other, full), full


def check_of(kind: Any, label: str, epsilon: float = 0.2) -> LabelTest:
    promise = LabelBound(kind=kind, label=label, epsilon=epsilon)
    [found] = Terms(of_objects(label_bounds=(promise,))).tests
    return found


@KINDS
@VALUES
def test_a_promise_about_a_value_is_one_about_a_label_of_its_field_alone(kind, label):
    (early, full), of_object = drawn(0), check_of(kind, label)
    field, place = OBJECTS.at(label)
    alone = LabelTest(of_object.promise, place, of_object.bound)
    digits = [LINK.place_in(field, one) for one in (early, full)]
    assert 0 < of_object.risk(early, full).risk < (early != full).mean()
    assert of_object.risk(early, full) == alone.risk(*digits)


@KINDS
def test_an_object_that_differs_in_other_fields_breaks_no_promise_about_a_value(kind):
    _, full = drawn(0)
    other = np.where(full % 2 == 0, full + 1, full - 1)  # the last field, turned round
    assert [LINK.places(code)[:2] for code in other] == [LINK.places(code)[:2] for code in full]
    assert check_of(kind, 'mood="fine"').risk(other, full).risk == 0
    assert check_of(kind, "part.seen=true").risk(other, full).risk == 1


@VALUES
def test_of_two_parts_the_worse_one_counts_for_the_value(label):
    """Where full depth has the value both must have it, and elsewhere none of them may."""
    field, place = OBJECTS.at(label)
    read = partial(LINK.place_in, field)
    (whole, full), last = drawn(1, changed=0.5), drawn(2)[1]

    def point(answers: Any) -> PathPoint:
        nothing = np.zeros(ROWS)
        return PathPoint(0.5, nothing.astype(np.int64), nothing, answers, full, 0.0, nothing)

    found = Pair(point(whole), point(last), np.zeros(ROWS)).answers_about(place, read)
    for answer, of_whole, of_last, wanted in zip(found, whole, last, full, strict=True):
        assert answer in (of_whole, of_last)
        has = {read(of_whole) == place, read(of_last) == place}
        expected = all(has) if read(wanted) == place else any(has)
        assert (read(answer) == place) == expected


def test_too_few_objects_with_a_value_are_an_error_that_counts_them():
    full = np.zeros(ROWS, dtype=np.int64)
    full[:5] = [1, 3, 5, 1, 3]  # with any mood
    check_of("recall", "part.seen=true", 0.5).check(full)
    with pytest.raises(AdaInferError, match=r"answers with part\.seen=true, and there are 5: give"):
        check_of("recall", "part.seen=true", 0.01).check(full)


def test_objects_with_a_value_that_is_never_early_are_told_by_its_field():
    target = of_objects(never_early=('mood="bad"', "part.seen=true")).target
    codes = np.arange(6)
    for code, never in zip(codes.tolist(), target.are_never_early(codes), strict=True):
        mood, _, seen = LINK.places(code)
        assert never == (mood == 0 or seen == 1)
    assert not of_objects().target.are_never_early(codes).any()
