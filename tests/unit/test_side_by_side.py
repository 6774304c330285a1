"""Pieces of a fit run side by side, each on one thread, and come in their order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from tests.calibrations import LABEL_IDS, SPLIT, base_of, of_prompts, recording_of_prompts
from vllm_adainfer.offline.calibration.fit import students
from vllm_adainfer.offline.calibration.fit.side_by_side import side_by_side
from vllm_adainfer.offline.calibration.fit.students import sizes_of, train_students
from vllm_adainfer.offline.calibration.fit.training import Lesson


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Also in a process that has run an engine, in which vLLM puts a stub in torch's place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", torch._C.set_num_threads)
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    with threads(2):
        yield


@pytest.mark.usefixtures("two_threads")
def test_as_many_run_at_once_as_torch_has_threads_each_with_one():
    both = threading.Barrier(2)

    def piece(number: int) -> tuple[int, int]:
        both.wait(timeout=60)
        return number, torch.get_num_threads()

    found = list(side_by_side([partial(piece, number) for number in range(6)]))
    assert found == [(number, 1) for number in range(6)]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_one_is_raised_and_torch_has_its_threads_again():
    def fails() -> int:
        raise ValueError("no rows")

    with pytest.raises(ValueError, match="no rows"):
        list(side_by_side([fails, lambda: 1]))
    assert torch.get_num_threads() == 2


def test_students_trained_side_by_side_are_those_trained_one_after_the_other(monkeypatch):
    monkeypatch.setattr(students, "STUDENT_EPOCHS", 2)
    recording = recording_of_prompts(0.6)
    lesson, base = Lesson.of(of_prompts(recording)), base_of(recording, 9)
    sizes = sizes_of(base)
    with threads(1):
        alone = [one.unseen for size in sizes for one in train_students(base, lesson, [size])]
    with threads(4):
        together = [one.unseen for one in train_students(base, lesson)]
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert np.unique(LABEL_IDS[alone[-1].argmax(1)]).size == 2
    assert len(alone[0]) == len(SPLIT.fit)
