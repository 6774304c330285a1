"""Split the prompts, and check that the labels and the rows suffice for what is promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.questions import SEEN, ends_of
from vllm_adainfer.offline.calibration.data.split import (
    Split,
    alike_of,
    groups_of,
    numbered,
    random_order,
)
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.promise.promise import Unit

# The held-out rows are enough if the bound holds at this share of epsilon, measured on them.
ALLOWANCE = 0.6
# Of more rows than this, fits gain less from a row than the bound does: simulated, thresholds from
# 15 to 30 % of the rows save 0.1 to 0.5 points more at 6,000 rows, and 0.4 to 0.8 at 12,000.
MANY_ROWS = 3000
CERTIFYING = 0.2, 0.25  # of many rows; within this, the size that allows the largest risk


def split_examples(
    examples: Sequence[Example], options: PolicyOptions, data: str
) -> tuple[list[Example], Split]:
    """The prompts in random order, and which of them fit and certify.

    An AdaInferError if they are too few, or no groups as the promise is about.
    """
    groups = groups_of(examples)
    options.promise.check_groups(groups, data)
    alike = alike_of(examples, groups)
    order = random_order(groups if alike is None else alike, options.seed)
    examples = [examples[index] for index in order]
    if alike is not None:
        alike = numbered(alike[order].tolist())
    split = split_of(numbered(groups[order].tolist()), options, alike)
    check_rows(split, options, data)
    return examples, split


def split_of(groups: Ints, options: PolicyOptions, alike: Ints | None = None) -> Split:
    """The prompts in two parts; `groups` and `alike` [prompts] are as for `Split.of_groups`.

    The part that certifies has what the bound needs, at most half of the prompts: heads of a
    pooled policy have much to learn, and rows beyond this loosen thresholds only a little. Of many
    rows it has a share, which loosens them more than heads would gain. The rule does not look at a
    single answer. Bounds that need more rows get half.
    """
    half, bound = Split.of_groups(groups, alike=alike), Bound.promised(options)
    some_rows = options.by_question or bool(options.label_bounds)  # each bound on rows of its own
    counts_groups = options.promise.unit is Unit.QUERY
    alone = counts_groups or half.most_together(groups) == 1
    if some_rows or bound.kind != "exact" or not alone:
        return half
    rows = int(half.units[-1]) + 1  # but for large groups among the others, each row is one
    sizes = np.unique(np.geomspace(1, rows - rows // 2, 200).round().astype(int)).tolist()
    wanted = ALLOWANCE * options.epsilon
    enough = (size for size in sizes if bound.allowance(size, options.epsilon) >= wanted)
    held_out = next(enough, sizes[-1])
    if rows > MANY_ROWS:
        least, most = (max(held_out, round(share * rows)) for share in CERTIFYING)
        larger = np.unique(np.linspace(least, most, 20).round().astype(int)).tolist()
        held_out = max(larger, key=lambda size: bound.allowance(size, options.epsilon))
    split = Split.of_groups(groups, held_out, alike)
    return split if counts_groups or split.most_together(groups) == 1 else half


def check_rows(split: Split, options: PolicyOptions, data: str) -> None:
    """Check that the held-out rows could certify the bound if not one answer differed.

    An AdaInferError if it has too few rows; the message says how many are needed.
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

    An AdaInferError if none can be recognised, or none has prompts enough.
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

    An AdaInferError if one names another label, or no label is left that may leave early.
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


def check_fields(options: PolicyOptions, fields: Mapping[str, Sequence[str]]) -> None:
    """Check that each of the `fields` of an object, with its values as JSON, may be early.

    An AdaInferError if one may have no value in an early object.
    """
    for path, values in fields.items():
        if {f"{path}={value}" for value in values}.issubset(options.never_early):
            raise AdaInferError(
                f"--never-early names every value of {path}, so that no object could be early: "
                "drop one"
            )
