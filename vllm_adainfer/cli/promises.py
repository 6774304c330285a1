"""The values of options that say what `calibrate` promises, and about what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.artifact.kinds import LabelBoundKind
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.kinds import PROMISES
from vllm_adainfer.promise.promise import Promise, labelled


def promise_of(asked: Mapping[str, Any]) -> Promise:
    """The promise that is asked for by the values of options, by name.

    An AdaInferError if two are asked for, or a value is of another form than its option's.
    """
    given = [one for one in PROMISES if asked.get(one.option) is not None]
    if len(given) > 1:
        bounds = ", ".join(f"{one.option} bounds {one.bounds}" for one in given)
        options = ", ".join(one.option for one in given)
        raise AdaInferError(f"{bounds}, and a policy has one bound: drop all but one of {options}")
    [kind] = given or [Changed]
    return kind.asked(asked.get(kind.option))


def label_bounds(kind: LabelBoundKind, asked: Sequence[str]) -> tuple[LabelBound, ...]:
    """The promises of ``--recall`` or ``--precision``.

    An AdaInferError if one is not of the form LABEL:EPSILON.
    """

    def promise(label: str, epsilon: float) -> LabelBound:
        return LabelBound(kind=kind, label=label, epsilon=epsilon)

    must_be = "a label and a share between 0 and 1, such as unsafe:0.005"
    return labelled(f"--{kind}", asked, promise, must_be)


def choice_texts(text: str) -> tuple[str, ...]:
    """The texts of ``--choices``, as they are written between the commas.

    An AdaInferError if some begin with a blank and others do not, which is probably a mistake.
    """
    texts = tuple(text.split(",")) if text else ()
    if len({one.startswith(" ") for one in texts}) > 1:
        raise AdaInferError(
            f"--choices {text!r}: some begin with a blank, which belongs to the choice, and others "
            "do not: write them as requests do, without a blank after the comma unless all have one"
        )
    return texts


def layers_of(text: str) -> tuple[int, ...] | None:
    """The layers of ``--exit-points``; None for auto.

    An AdaInferError if they are no numbers.
    """
    if text == "auto":
        return None
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise AdaInferError(
            f"--exit-points must be auto or layers such as 12,18,24, not {text!r}"
        ) from None
