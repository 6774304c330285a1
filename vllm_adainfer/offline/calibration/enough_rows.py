"""Check that the labels and the rows suffice for what is promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.questions import SEEN, ends_of
from vllm_adainfer.offline.calibration.data.split import Split, groups_of
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.promise.promise import Unit


def check_rows(split: Split, options: PolicyOptions, data: str) -> None:
    """Check that the held-out rows could certify the bound if not one answer differed.

    Raises:
        AdaInferError: it has too few rows; the message says how many are needed.

    """
    together, rows = split.most_together(split.groups), len(split.certify)
    counts_queries = options.promise.unit is Unit.QUERY
    if counts_queries:
        together, rows = 1, len(np.unique(split.groups[split.certify]))
    groups, repeats = split.groups[split.certify], split.repeats
    bound = Bound.promised(
        options, groups, together, None if repeats is None else repeats[split.certify]
    )
    if bound.holds(np.zeros(rows), options.epsilon):
        return
    needed = bound.groups_needed(rows, options.epsilon)
    what = "rows" if repeats is None else "different prompts"
    if counts_queries:
        what = "queries"
    elif together > 1:
        what = f"groups of requests that came together (of up to {together})"
    raise AdaInferError(
        f"too few rows for the bound: epsilon {options.epsilon:g} at delta {options.delta:g} needs "
        f"at least {2 * needed - 1} {what} (half of them held out), but {data} has "
        f"{split.units.max(initial=-1) + 1}: give more rows or raise --epsilon"
    )


def check_questions(examples: Sequence[Example], options: PolicyOptions, data: str) -> None:
    """Check that a question could be certified on its own if not one answer differed.

    Raises:
        AdaInferError: none can be recognised, or none has prompts enough.

    """
    known = ends_of(examples)
    if not known:
        raise AdaInferError(
            f"no question of {data} can be recognised by the end of its prompts: one needs {SEEN} "
            "prompts that end with it, and that no prompt of another ends with it; or drop --by"
        )
    together = Counter(
        (example.question, group)
        for example, group in zip(examples, groups_of(examples).tolist(), strict=True)
        if example.question in known
    )
    bound = Bound.promised(options, together=max(together.values()))
    needed = 2 * bound.groups_needed(1, options.epsilon)
    [(_, most)] = Counter(question for question, _ in together).most_common(1)
    if most < needed:
        what = "prompts" if bound.longest == 1 else "groups of requests that came together"
        raise AdaInferError(
            f"too few rows for a bound by question: epsilon {options.epsilon:g} at delta "
            f"{options.delta:g} needs about {needed} {what} of each (half of them held out), but "
            f"the commonest in {data} has {most}: give more rows, raise --epsilon or drop --by"
        )


def check_labels(options: PolicyOptions, labels: Sequence[Label]) -> None:
    """Check that the promises are about `labels`.

    Raises:
        AdaInferError: one names another label, or no label is left that may leave early.

    """
    names = [label.name for label in labels]
    asked = [(f"--{one.kind}", one.label) for one in options.label_bounds]
    asked += [("--never-early", label) for label in options.never_early]
    asked += [(options.promise.option, label) for label in options.promise.named]
    for option, label in asked:
        if label not in names:
            raise AdaInferError(
                f"{option} {label}: there is no such label: name one of {', '.join(names)}"
            )
    if names and not set(names).difference(options.never_early):
        raise AdaInferError(
            "--never-early names every label, so that no request could leave early: drop one"
        )
