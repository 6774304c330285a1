"""The suite's tasks: their definitions, and their prompts from data files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from benchmarks.suite.hub import Hub, Part, hub_rows
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import (
    Example,
    Row,
    fill,
    find_labels,
    first_token,
    read_rows,
)


class Task(BaseModel):
    """A task of the suite.

    A prompt consists of the shots, each followed by its answer, and the row's filled template. An
    answer is one token: that of a label, or any token if there are no labels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Also the task's folder in the data directory.")
    title: str
    template: str = Field(pattern=r"\S$", description="Format string over a row's fields.")
    separator: str = Field(description="Between a shot's answer and the next prompt.")
    answer: str = Field(description="Field with the right answer, or a list of accepted ones.")
    labels: dict[str, str] = Field(
        {}, description="Answer in the data to its word in the prompt; empty: open vocabulary."
    )
    shots: int = Field(ge=0, description="How many answered training rows precede a prompt.")
    cut: dict[str, PositiveInt] = Field(
        {}, description="Field to how many of its characters are kept."
    )
    longest: dict[str, PositiveInt] = Field(
        {},
        description="Field to its most characters: longer rows are skipped, because truncation "
        "could remove the answer.",
    )
    lettered: str | None = Field(
        None, description="Field that lists choices: shown one per line, each after its label."
    )
    hub: Hub


class Suite(BaseModel):
    """A suite file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[Task, ...]

    def select(self, names: Sequence[str]) -> tuple[Task, ...]:
        """The named tasks, in this order; all tasks if none is named.

        An AdaInferError if a name is unknown.
        """
        known = {task.name: task for task in self.tasks}
        for name in names:
            if name not in known:
                raise AdaInferError(
                    f"there is no task {name!r} in this suite; it has {', '.join(known)}"
                )
        return tuple(known[name] for name in names) or self.tasks


@dataclass(frozen=True)
class TaskData:
    """The prompts of one task, with the tokens that count as right for each.

    Attributes:
        shots: number of answered rows before each prompt, the same rows for all.
        labels: the possible answers; empty if the vocabulary is open.
        train: prompts to calibrate on, without the shots.
        test: prompts to measure on.
        chance: share of `test` that the best constant answer gets right.
        skipped: number of rows left out because they are too long.

    """

    task: Task
    shots: int
    labels: tuple[Label, ...]
    train: list[Example]
    test: list[Example]
    train_answers: list[set[int]]
    answers: list[set[int]]
    chance: float
    skipped: int


def load_suite() -> Suite:
    """The tasks of AdaInfer's paper and five more, see `adainfer.json`."""
    file = Path(__file__).with_name("adainfer.json")
    return Suite.model_validate_json(file.read_text(encoding="utf-8"))


def load_task(
    task: Task,
    data_dir: Path | None,
    tokenizer: Any,
    shots: int | None,
    max_train: int | None,
    max_test: int | None,
    max_tokens: int,
) -> TaskData:
    """Read a task's rows and make its prompts.

    Args:
        task: from a suite.
        data_dir: holds ``<task name>/train.jsonl`` and ``test.jsonl``; None fetches from the hub.
        tokenizer: a Hugging Face tokenizer.
        shots: answered rows before each prompt; None takes the task's own number.
        max_train: most prompts to calibrate on, drawn at random; None takes all.
        max_test: the same for the prompts to measure on.
        max_tokens: longest prompt the model takes; longer ones are skipped, never truncated.

    Raises:
        AdaInferError: files, fields or labels are missing or wrong, or no prompt fits.

    """
    train_rows, test_rows = rows_of(task, data_dir, "train"), rows_of(task, data_dir, "test")
    shot_rows = _choose_shots(task, train_rows, task.shots if shots is None else shots)
    prefix = "".join(
        f"{_prompt(task, row)} {_accepted(task, row)[0]}{task.separator}" for row in shot_rows
    )
    shown = {row.place for row in shot_rows}
    to_calibrate = _shuffled([row for row in train_rows if row.place not in shown])
    train = _make(task, to_calibrate, prefix, tokenizer, max_train, max_tokens)
    test = _make(task, _shuffled(test_rows), prefix, tokenizer, max_test, max_tokens)
    labels = (
        find_labels(list(task.labels.values()), test.examples[0], tokenizer) if task.labels else ()
    )
    answers = _right_tokens(test, labels, tokenizer)
    return TaskData(
        task=task,
        shots=len(shot_rows),
        labels=labels,
        train=train.examples,
        test=test.examples,
        train_answers=_right_tokens(train, labels, tokenizer),
        answers=answers,
        chance=Counter(chain.from_iterable(answers)).most_common(1)[0][1] / len(answers),
        skipped=train.skipped + test.skipped,
    )


def rows_of(task: Task, data_dir: Path | None, part: Part) -> list[Row]:
    """Read one part of a task's data; see `load_task`."""
    if data_dir is None:
        return hub_rows(task.hub, part, task.answer)
    path = data_dir / task.name / f"{part}.jsonl"
    if not path.is_file():
        raise AdaInferError(
            f"--data-dir {data_dir} has no file {task.name}/{part}.jsonl, which the task "
            f"{task.name} needs: give a directory with the folder of every task asked for"
        )
    return read_rows(path)


def _choose_shots(task: Task, rows: Sequence[Row], count: int) -> list[Row]:
    """Rows of each class in turn, or just the first rows if there are no classes."""
    by_word: dict[str, list[Row]] = {word: [] for word in task.labels.values() or [""]}
    for row in rows:
        if _short_enough(task, row):
            by_word[_accepted(task, row)[0] if task.labels else ""].append(row)
    chosen = list(islice(chain.from_iterable(zip(*by_word.values(), strict=False)), count))
    if len(chosen) < count:
        raise AdaInferError(
            f"--shots {count}: the task {task.name} has training rows for only {len(chosen)} "
            "balanced shots: ask for fewer shots"
        )
    return chosen


def _shuffled(rows: Sequence[Row]) -> list[Row]:
    """`rows` in a fixed random order: files may be sorted by class, and not all rows are used."""
    return [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]


def _short_enough(task: Task, row: Row) -> bool:
    return all(len(str(row.fields.get(name))) <= most for name, most in task.longest.items())


def _prompt(task: Task, row: Row) -> str:
    """The template filled with the row, after truncating fields and lettering choices."""
    fields = dict(row.fields)
    for name in fields.keys() & task.cut.keys():
        fields[name] = str(fields[name])[: task.cut[name]]
    if task.lettered in fields:
        choices = fields[task.lettered]
        if not isinstance(choices, list) or len(choices) != len(task.labels):
            raise AdaInferError(
                f"{row.place}: {task.lettered!r} must be a list of {len(task.labels)} choices"
            )
        fields[task.lettered] = "\n".join(
            f"{word}. {choice}" for word, choice in zip(task.labels.values(), choices, strict=True)
        )
    return fill(task.template, Row(row.place, fields))


def _accepted(task: Task, row: Row) -> list[str]:
    """The accepted answers, the preferred one first."""
    found = row.fields.get(task.answer)
    if task.labels:
        if str(found) not in task.labels:
            raise AdaInferError(
                f"{row.place}: {task.answer} {found!r} is not among {', '.join(task.labels)}"
            )
        return [task.labels[str(found)]]
    answers = [found] if isinstance(found, str) else found
    if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers):
        answers = [answer.strip() for answer in answers if answer.strip()]
        if answers:
            return answers
    raise AdaInferError(
        f"{row.place}: {task.answer!r} must be an answer or a list of accepted ones"
    )


@dataclass(frozen=True)
class _Prompts:
    examples: list[Example]
    accepted: list[list[str]]
    skipped: int


def _make(
    task: Task,
    rows: Sequence[Row],
    prefix: str,
    tokenizer: Any,
    most: int | None,
    max_tokens: int,
) -> _Prompts:
    """Prompts from the first `most` rows that are not too long."""
    examples: list[Example] = []
    accepted: list[list[str]] = []
    skipped = 0
    for row in rows:
        if len(examples) == most:
            break
        text, answers = prefix + _prompt(task, row), _accepted(task, row)
        token_ids = tokenizer.encode(text)
        if not _short_enough(task, row) or len(token_ids) > max_tokens:
            skipped += 1
            continue
        examples.append(Example(row.place, text, token_ids, answers[0]))
        accepted.append(answers)
    if not examples:
        raise AdaInferError(
            f"no prompt of the task {task.name} is left: {skipped} are too long for the task or "
            f"the model's {max_tokens} tokens; ask for fewer shots or give more rows"
        )
    return _Prompts(examples, accepted, skipped)


def _right_tokens(prompts: _Prompts, labels: Sequence[Label], tokenizer: Any) -> list[set[int]]:
    """For each prompt, the first tokens of its accepted answers."""
    if labels:
        ids = {label.name: label.token_id for label in labels}
        return [{ids[answers[0]]} for answers in prompts.accepted]
    return [
        {first_token(example.text, answer, tokenizer) for answer in answers}
        for example, answers in zip(prompts.examples, prompts.accepted, strict=True)
    ]
