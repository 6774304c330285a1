"""The values of options that say what `calibrate` promises, and about what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from vllm_adainfer.artifact.fields import Gate, LabelBound, TopK
from vllm_adainfer.artifact.kinds import LabelBoundKind, Risk
from vllm_adainfer.errors import AdaInferError

T = TypeVar("T")


def risk_of(
    risk: Literal["disagreement", "accuracy"],
    tolerance: float | None,
    gates: Sequence[str],
    top: str | None,
) -> Risk:
    """The risk that epsilon bounds.

    Raises:
        AdaInferError: two are asked for.

    """
    others = {
        "--gate bounds how often probabilities are on the wrong side": bool(gates),
        "--tolerance bounds how far probabilities move": tolerance is not None,
        "--top bounds how often queries lose a document": top is not None,
    }
    asked = [said for said, given in others.items() if given]
    if asked and risk == "accuracy":
        raise AdaInferError(
            f"{asked[0]}, --risk accuracy the accuracy lost, and a policy has one bound: drop one "
            "of them"
        )
    return "probability" if asked else risk


def gates_of(asked: Sequence[str]) -> tuple[Gate, ...]:
    """The gates of ``--gate``.

    Raises:
        AdaInferError: one is not of the form LABEL:P.

    """

    def gate(label: str, probability: float) -> Gate:
        return Gate(label=None if label == "best" else label, probability=probability)

    must_be = "a label, or best, and a probability between 0 and 1, such as unsafe:0.8"
    return _each("--gate", asked, gate, must_be)


def top_k_of(text: str | None) -> TopK | None:
    """The promise of ``--top``.

    Raises:
        AdaInferError: it is not of the form K:MARGIN.

    """
    if text is None:
        return None
    k, _, margin = text.partition(":")
    try:
        return TopK(k=int(k), margin=float(margin))
    except ValueError:
        raise AdaInferError(
            f"--top {text!r:.80} must be a number of documents and a margin between 0 and 1, such "
            "as 5:0.05"
        ) from None


def label_bounds(kind: LabelBoundKind, asked: Sequence[str]) -> tuple[LabelBound, ...]:
    """The promises of ``--recall`` or ``--precision``.

    Raises:
        AdaInferError: one is not of the form LABEL:EPSILON.

    """

    def promise(label: str, epsilon: float) -> LabelBound:
        return LabelBound(kind=kind, label=label, epsilon=epsilon)

    must_be = "a label and a share between 0 and 1, such as unsafe:0.005"
    return _each(f"--{kind}", asked, promise, must_be)


def _each(
    option: str, asked: Sequence[str], make: Callable[[str, float], T], must_be: str
) -> tuple[T, ...]:
    """Each LABEL:NUMBER, as `make` builds it.

    Raises:
        AdaInferError: one has another form, or its number is out of range.

    """
    found = []
    for text in asked:
        label, _, number = text.rpartition(":")
        try:
            found.append(make(label, float(number)))
        except ValueError:
            raise AdaInferError(f"{option} {text!r:.80} must be {must_be}") from None
    return tuple(found)


def choice_texts(text: str) -> tuple[str, ...]:
    """The texts of ``--choices``, as they are written between the commas.

    Raises:
        AdaInferError: some begin with a blank and others do not, which is probably a mistake.

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

    Raises:
        AdaInferError: they are no numbers.

    """
    if text == "auto":
        return None
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise AdaInferError(
            f"--exit-points must be auto or layers such as 12,18,24, not {text!r}"
        ) from None
