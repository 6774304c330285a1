"""A promise about the values of probabilities: how often one moves too far."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.promise.links import ByField
from vllm_adainfer.promise.promise import Outcome, Promise


class Tolerance(Promise):
    """In at most epsilon of the answers a label's probability moves by more than the tolerance.

    Where one label holds, another best one is wrong, too; of objects, another object. With the
    label mass, probabilities in the whole vocabulary count, and an answer is also wrong if the best
    token of all is no label.

    """

    kind: Literal["tolerance"] = "tolerance"
    tolerance: float = Field(gt=0, lt=1, description="How far a label's probability may move.")
    label_mass: bool = Field(
        default=False,
        description="Whether the tolerance also covers probabilities over the whole vocabulary.",
    )
    reads_values: ClassVar[bool] = True
    section: ClassVar[str] = "probabilities"
    beyond: ClassVar[str] = "beyond the tolerance of {tolerance:g}"
    bounds: ClassVar[str] = "how far probabilities move"
    option: ClassVar[str] = "--tolerance"

    @classmethod
    @override
    def asked(cls, value: float) -> Tolerance:
        return cls(tolerance=value)

    @property
    @override
    def covers_mass(self) -> bool:
        return self.label_mass

    @property
    @override
    def about_each(self) -> bool:
        return True

    @override
    def with_mass(self) -> Tolerance | None:
        """Of objects None: their grammar allows no other tokens."""
        if isinstance(self.link, ByField):
            return None
        return self.model_copy(update={"label_mass": True})

    @override
    def admits(self) -> dict[str, object]:
        return super().admits() | {"whether it certifies the label mass": self.covers_mass}

    @override
    def wrong(self, early: Outcome, full: Outcome) -> Tensor:
        wrong = ~(self.moves(early, full) <= self.tolerance)
        if self.link.one_holds:
            wrong |= early.best != full.best
        if self.covers_mass:
            assert full.is_label is not None
            wrong |= ~full.is_label
        return wrong

    @override
    def compared(self, early: Outcome, full: Outcome) -> dict[str, Tensor]:
        return {"label_differs": early.best != full.best, **super().compared(early, full)}

    @override
    def moves(self, early: Outcome, full: Outcome) -> Tensor:
        assert early.labels is not None
        assert full.labels is not None
        return early.labels.largest_move(full.labels, self.covers_mass)

    @override
    def words(self) -> str:
        far = f"by more than {self.tolerance:g}"
        if isinstance(self.link, ByField):
            return f"another object than full depth's, or a value's probability that moves {far}"
        if not self.link.one_holds:
            return f"a label's probability that moves {far}"
        where = "" if self.vocabulary is None else " (among the labels or in the whole vocabulary)"
        return (
            f"another best label than full depth's, or a label's probability{where} that moves "
            f"{far}"
        )
