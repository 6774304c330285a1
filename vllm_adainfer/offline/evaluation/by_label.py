"""The report's rows about single labels, by full depth and by the data, and about fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.outputs import NO_OBJECT, Objects
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.same_pass import Counts
from vllm_adainfer.offline.evaluation.sequences import Tokens
from vllm_adainfer.offline.reports.shares import Share, clopper_pearson, verdict

OTHER = -1  # an answer that is no label
NOT_COUNTED: Mapping[str, Counts] = {}


def label_rows(
    config: ArtifactConfig,
    examples: Sequence[Example],
    groups: Ints,
    early: Sequence[Tokens],
    full: Sequence[Tokens],
    counted: Mapping[str, Counts] = NOT_COUNTED,
) -> list[dict[str, Any]]:
    """A row for each label that full depth, an early answer or the data names.

    A share has its 95 % interval under the same name with ``_95``, and is None without rows.
    `groups` [prompts] are independent. `counted` are the labels of a `SamePass`, which verdicts are
    about; without it, they are about the two passes `early` and `full`.

    Returns:
        for each label ``label``; ``full_depth`` and ``answered``, how many prompts full depth and
        we answer with it; ``recall`` and ``precision`` of our answers against full depth; where
        all prompts have labels, ``right``, how many are right with it, and ``true_recall`` and
        ``true_precision`` against those; and ``verdicts``, by promise.

    """
    if config.objects is not None:
        return _value_rows(config, config.objects, groups, early, full, counted)
    names, columns = _columns(config)
    ours, deep = (
        np.array([columns.get(tuple(text), OTHER) for text in texts]) for texts in (early, full)
    )
    right = None
    if all(example.label is not None for example in examples):
        wanted = {name: column for column, name in enumerate(names)}
        wanted |= {str(ids[0]): column for ids, column in columns.items()}
        right = np.array([wanted.get(str(example.label), OTHER) for example in examples])
    rows = []
    for column, name in enumerate(names):
        answered, wanted_by = ours == column, deep == column
        row = _against_full_depth(name, answered, wanted_by, groups)
        is_right = np.zeros_like(answered)
        if right is not None:
            is_right = right == column
            row |= {
                "right": int(is_right.sum()),
                **_share("true_recall", answered, is_right, groups),
                **_share("true_precision", is_right, answered, groups),
            }
        row["verdicts"] = _verdicts(config, name, row, counted)
        if (answered | wanted_by | is_right).any():
            rows.append(row)
    return rows


def field_rows(
    objects: Objects, groups: Ints, early: Sequence[Tokens], full: Sequence[Tokens]
) -> list[dict[str, Any]]:
    """Of each field of an object, the share of the answers in which it ``differs``.

    An answer that is no object of the schema has no values.
    """
    pairs = zip(_values(objects, early), _values(objects, full), strict=True)
    return [
        {"field": field.path, **_share("differs", ours != deep, np.ones_like(ours, bool), groups)}
        for field, (ours, deep) in zip(objects.fields, pairs, strict=True)
    ]


def _value_rows(
    config: ArtifactConfig,
    objects: Objects,
    groups: Ints,
    early: Sequence[Tokens],
    full: Sequence[Tokens],
    counted: Mapping[str, Counts],
) -> list[dict[str, Any]]:
    """`label_rows` of objects, whose labels are the values of their fields."""
    ours, deep, rows = _values(objects, early), _values(objects, full), []
    for label in config.labels:
        field, place = objects.at(label.name)
        answered, wanted_by = ours[field] == place, deep[field] == place
        row = _against_full_depth(label.name, answered, wanted_by, groups)
        row["verdicts"] = _verdicts(config, label.name, row, counted)
        if (answered | wanted_by).any():
            rows.append(row)
    return rows


def _values(objects: Objects, texts: Sequence[Tokens]) -> list[Ints]:
    """Of each field, its value in each answer: `OTHER` in one that is no object."""
    codes = np.array([code for [code] in texts])
    places = (objects.link.place_in(field, codes) for field in range(len(objects.fields)))
    return [np.where(codes == NO_OBJECT, OTHER, of_field) for of_field in places]


def _against_full_depth(
    label: str, answered: Bools, wanted_by: Bools, groups: Ints
) -> dict[str, Any]:
    """The parts of a row that need no right answers."""
    return {
        "label": label,
        "full_depth": int(wanted_by.sum()),
        "answered": int(answered.sum()),
        **_share("recall", answered, wanted_by, groups),
        **_share("precision", wanted_by, answered, groups),
    }


def _columns(config: ArtifactConfig) -> tuple[list[str], dict[tuple[int, ...], int]]:
    """The names of the answers, and the place of each by its tokens."""
    if config.choices:
        texts = {choice.text: choice.token_ids for choice in config.choices}
    else:
        texts = {label.name: (label.token_id,) for label in config.labels}
    return [*texts], {ids: column for column, ids in enumerate(texts.values())}


def _share(name: str, hits: Bools, among: Bools, groups: Ints) -> dict[str, Any]:
    """The share of the rows `among` that are hits."""
    if not among.any():
        return {name: None, f"{name}_95": None}
    share = Share.of(hits[among], groups[among])
    return {name: share.value, f"{name}_95": share.interval}


def _verdicts(
    config: ArtifactConfig, label: str, row: Mapping[str, Any], counted: Mapping[str, Counts]
) -> dict[str, str]:
    """Whether what changes is within what is promised of a label, by the kind of promise."""
    found: dict[str, str] = {}
    for promise in config.label_bounds:
        if promise.label != label:
            continue
        compared, changes = counted.get(f"{promise.kind} of {label}", (0, 0))
        if compared:
            interval = clopper_pearson(changes, compared)
            found[promise.kind] = verdict(changes / compared, interval, promise.epsilon)
        elif row[promise.kind] is not None:
            low, high = row[f"{promise.kind}_95"]
            changed = 1 - row[promise.kind]
            found[promise.kind] = verdict(changed, (1 - high, 1 - low), promise.epsilon)
    return found
