"""The prompts of the comparison, and what the whole model did with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals.judged import Unseen
from benchmarks.suite.tasks import load_suite
from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.calibrate import record_prompts
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import Prompts, load_prompts, right_tokens
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer

QUESTIONS = "questions"  # the folder of the eight
CUT_SHARE = 1 / 3  # of the model's layers


def sample(data: Path, output: Path, count: int) -> int:
    """Write so many random rows of the files in a folder, or all; returns how many."""
    files = sorted(data.glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = np.random.default_rng(0).permutation(len(lines))[:count]
    output.write_text("".join(f"{lines[place]}\n" for place in chosen), encoding="utf-8")
    return len(chosen)


def form_of(task: str) -> tuple[str, dict[str, Any]]:
    """The title of a task, and what a `CalibrationRequest` says of its rows."""
    if task == QUESTIONS:
        return "eight questions", {"label_pool": ("letters", "yes-no")}
    [found] = load_suite().select([task])
    return found.title, {"template": found.template, "labels": (*found.labels.values(),)}


@dataclass(frozen=True)
class Task:
    """The prompts of a task, in random order, and what the whole model did with them.

    Classifiers read all of a text but what every prompt begins and ends with. Nothing is fitted to
    the `tests`, the last ones.
    """

    request: CalibrationRequest
    prompts: Prompts
    texts: Sequence[str]
    recording: Rows
    tests: Unseen

    @property
    def cut_layers(self) -> int:
        """The layers of the cut model."""
        return round(CUT_SHARE * self.recording.model.depth)

    def labels(self, places: Ints) -> list[Sequence[int]]:
        """The label tokens that each prompt may be answered with."""
        common = [label.token_id for label in self.prompts.output.labels]
        return [self.prompts.examples[place].labels or common for place in places.tolist()]

    def examples(self, places: Ints) -> list[Example]:
        """Some of the prompts."""
        return [self.prompts.examples[place] for place in places.tolist()]

    def texts_of(self, places: Ints) -> list[str]:
        """Their texts."""
        return [self.texts[place] for place in places.tolist()]


def read_task(request: CalibrationRequest, most: int) -> Task:
    """Read the prompts, and run the whole model on them; the first `most` are for calibration."""
    prompts = load_prompts(request)
    recording = record_prompts(request, prompts)
    examples = prompts.examples
    start, end = ends_of([example.text for example in examples])
    texts = [example.text[start : len(example.text) - end] for example in examples]
    rows = np.arange(most, len(examples))
    _, tokenizer = load_config_and_tokenizer(request.model)
    rights = right_tokens([examples[row] for row in rows], prompts.output.labels, tokenizer)
    tests = Unseen(rows, recording.tokens[rows], rights)
    return Task(request, prompts, texts, recording, tests)


def ends_of(texts: Sequence[str]) -> tuple[int, int]:
    """The number of characters that all texts begin with, and end with."""
    start = _shared(texts)
    return start, _shared([text[start:][::-1] for text in texts])


def _shared(texts: Sequence[str]) -> int:
    """The number of characters that all texts begin with."""
    first, last = min(texts), max(texts)  # if these two do, those between them do
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(first))
