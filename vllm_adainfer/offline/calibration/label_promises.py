"""Check promises about single labels: against the labels, then against the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify.label_bounds import LabelTest
from vllm_adainfer.offline.calibration.options import PolicyOptions


def check_labels(options: PolicyOptions, labels: Sequence[Label]) -> None:
    """Check that the promises are about `labels`.

    Raises:
        AdaInferError: one names another label, or no label is left that may leave early.

    """
    names = [label.name for label in labels]
    asked = [(f"--{one.kind}", one.label) for one in options.label_bounds]
    asked += [("--never-early", label) for label in options.never_early]
    asked += [("--gate", gate.label) for gate in options.gates if gate.label is not None]
    for option, label in asked:
        if label not in names:
            raise AdaInferError(
                f"{option} {label}: there is no such label: name one of {', '.join(names)}"
            )
    if names and not set(names).difference(options.never_early):
        raise AdaInferError(
            "--never-early names every label, so that no request could leave early: drop one"
        )


def check_rows(tests: Sequence[LabelTest], full: Ints) -> None:
    """Check that the held-out rows could certify each promise if not one answer changed.

    Args:
        tests: the promises.
        full: int64 [held-out rows], the full model's answers.

    Raises:
        AdaInferError: they are too few for one; the message says how many it needs.

    """
    for test in tests:
        if test.holds(full, full):
            continue
        promise, needed = test.promise, test.rows_needed(full)
        rows = test.rows_held(full)
        wanted = (
            f"about {math.ceil(needed / rows):d} times as many prompts"
            if rows
            else "prompts that it does"
        )
        raise AdaInferError(
            f"--{promise.kind} {promise.label}:{promise.epsilon:g} needs {needed} held-out prompts "
            f"that full depth answers with {promise.label}, and there are {rows}: give {wanted}, "
            "or promise less"
        )
