"""The report's rows about the probabilities of an object's fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.drafts.fields import places_in
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.probabilities import expected_calibration_error, reliability
from vllm_adainfer.offline.evaluation.run import Run


def probability_rows(
    objects: Objects, examples: Sequence[Example], run: Run, full: Run
) -> list[dict[str, Any]]:
    """Of each field, how far probabilities move, and the ECE; nothing where they are not read.

    A move is the largest of a field's values in an answer, compared with never exiting. ``ece``
    compares the likeliest value with the right one; it is None unless every example has an object
    of the schema as its label.
    """
    if run.logprobs is None or full.logprobs is None:
        return [{} for _ in objects.fields]
    truth, rows, first = _right_places(objects, examples), [], 0
    for number, field in enumerate(objects.fields):
        columns = slice(first, first := first + len(field.values))
        early, deep = (
            np.exp(one.logprobs[:, columns].astype(np.float64))
            for one in (run, full)
            if one.logprobs is not None
        )
        moves, ece = np.abs(early - deep).max(axis=1), None
        if truth is not None:
            ece = expected_calibration_error(reliability(early, truth[:, number]))
        rows.append({"move_mean": float(moves.mean()), "move_max": float(moves.max()), "ece": ece})
    return rows


def _right_places(objects: Objects, examples: Sequence[Example]) -> Ints | None:
    """[examples, fields], which value of each field is right."""
    fields = {field.path: [one.text for one in field.values] for field in objects.fields}
    found = [places_in(example.label or "", fields) for example in examples]
    return None if None in found else np.array(found)
