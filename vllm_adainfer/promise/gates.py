"""A promise about gates: numbers that requests compare a label's probability with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.promise.links import ByField
from vllm_adainfer.promise.promise import Outcome, Promise, labelled
from vllm_adainfer.strict import Strict

GATE_FEATURES = ("gate_distance", "gate_margin")
MOST_GATES = 64
DIGITS = 4  # of the probabilities in a report
FURTHEST = 20.0  # from a gate, in log-odds: beyond it, and without one, all answers are alike


class Gate(Strict):
    """A number that requests compare a probability with.

    Attributes:
        label: the name of the label whose probability it is; None for whichever label is best.
        probability: the number. The label's probability is among the labels, without the rest of
            the vocabulary.

    """

    label: str | None = Field(None, min_length=1)
    probability: float = Field(gt=0, lt=1)


def _different(gates: tuple[Gate, ...]) -> tuple[Gate, ...]:
    if len(set(gates)) < len(gates):
        raise ValueError("gates must be different")
    return gates


class Gates(Promise):
    """At most epsilon of the answers have a probability on the other side of a gate.

    Labels are [rows, labels]: scores, log-probabilities, or both up to a constant by row; -inf for
    a label that a row is not about. Where any number of labels may hold, scores alone.

    Of objects, a label's probability is among the values of its field, and another object is wrong,
    too: who acts on a gate reads the object beside it.
    """

    kind: Literal["gates"] = "gates"
    gates: Annotated[tuple[Gate, ...], AfterValidator(_different)] = Field(
        min_length=1,
        max_length=MOST_GATES,
        description="Numbers that requests compare a label's probability with. An answer is wrong "
        "if the probability is on the other side than at full depth.",
    )
    feature_names: ClassVar[tuple[str, ...]] = GATE_FEATURES
    best_may_change: ClassVar[bool] = True
    right_about: ClassVar[str] = (
        "probabilities are right about their side of the gates, not in value"
    )
    section: ClassVar[str] = "gates"
    beyond: ClassVar[str] = "on the other side of a gate"
    bounds: ClassVar[str] = "how often probabilities are on the wrong side"
    option: ClassVar[str] = "--gate"

    @classmethod
    @override
    def asked(cls, value: Sequence[str]) -> Gates:
        def gate(label: str, probability: float) -> Gate:
            return Gate(label=None if label == "best" else label, probability=probability)

        must_be = "a label, or best, and a probability between 0 and 1, such as unsafe:0.8"
        gates = labelled("--gate", value, gate, must_be)
        if len(set(gates)) < len(gates):
            raise AdaInferError("--gate names the same label and number twice: drop one")
        return cls(gates=gates)

    @property
    @override
    def vocabulary(self) -> int | None:
        return self._vocabulary

    @property
    @override
    def named(self) -> tuple[str, ...]:
        return tuple(gate.label for gate in self.gates if gate.label is not None)

    @property
    @override
    def about_each(self) -> bool:
        return all(gate.label is not None for gate in self.gates)

    def margins(self, labels: Tensor) -> Tensor:
        """fp32 [rows, gates], how far log-odds among the labels lie above each gate's."""
        best = labels.argmax(dim=1, keepdim=True)
        found = []
        for gate in self.gates:
            chosen = best
            if gate.label is not None:
                chosen = torch.full_like(best, self._labels.index(gate.label))
            odds = math.log(gate.probability / (1 - gate.probability))
            found.append(self.link.log_odds(labels, chosen) - odds)
        return torch.stack(found, dim=1).float()

    @override
    def features(self, scores: Tensor) -> Tensor:
        """The distance from the nearest gate in log-odds, and the same with its sign.

        Above a gate an answer may be surer than as far below it. See `GATE_FEATURES`. Another
        object is as far as the second value of the field that is least sure.
        """
        labels = scores[:, :-1]
        margins = self.margins(labels)
        if self._of_objects:
            margins = torch.cat([margins, self.link.lead(labels).unsqueeze(1)], dim=1)
        margins = margins.clamp(-FURTHEST, FURTHEST)
        nearest = margins.abs().argmin(dim=1, keepdim=True)
        margin = margins.gather(1, nearest)
        return torch.cat([margin.abs(), margin], dim=1)

    @property
    def _of_objects(self) -> bool:
        return isinstance(self.link, ByField)

    @property
    @override
    def best_counts(self) -> bool:
        return self._of_objects

    @property
    @override
    def serves_best(self) -> bool:
        """Of two labels, a gate at 0.5 on one decides which is best."""
        if self._of_objects:
            return True
        decides = [one for one in self.gates if one.label is not None and one.probability == 0.5]
        return len(self._labels) == 2 and bool(decides)

    @override
    def admits(self) -> dict[str, object]:
        return super().admits() | {"its gates": set(self.gates)}

    @override
    def wrong(self, early: Outcome, full: Outcome) -> Tensor:
        """Whether an answer is on the other side of a gate than at full depth.

        For a gate on the best label, it is also wrong if another label is best where full depth
        lies above the gate.
        """
        here, there = self._scores(early), self._scores(full)
        above = self.margins(there) >= 0
        wrong = ((self.margins(here) >= 0) != above).any(dim=1)
        of_best = [gate.label is None for gate in self.gates]
        if any(of_best):
            another = here.argmax(dim=1) != there.argmax(dim=1)
            wrong |= another & above[:, of_best].any(dim=1)
        if self._of_objects:
            wrong |= early.best != full.best
        return wrong

    @property
    @override
    def parts(self) -> tuple[Gates, ...]:
        return tuple(self.model_copy(update={"gates": (gate,)}) for gate in self.gates)

    @override
    def reported(self) -> dict[str, Any]:
        [gate] = self.gates
        return {"label": gate.label or "the best label", "probability": gate.probability}

    @override
    def probabilities(self, outcome: Outcome) -> list[float]:
        [gate] = self.gates
        odds = math.log(gate.probability / (1 - gate.probability))
        margins = self.margins(self._scores(outcome)).squeeze(1).double()
        return [round(one, DIGITS) for one in (margins + odds).sigmoid().tolist()]

    def _scores(self, outcome: Outcome) -> Tensor:
        if outcome.scores is not None:
            return outcome.scores
        assert outcome.labels is not None
        return self.link.scores_of(outcome.labels.among)

    @override
    def words(self) -> str:
        words = [self._words_of(gate) for gate in self.gates]
        if self._of_objects:
            words = ["another object than full depth's", *words]
        return " or ".join(words)

    def _words_of(self, gate: Gate) -> str:
        """Which answers are on the wrong side of a gate."""
        side = f"on the other side of {gate.probability:g} than at full depth"
        if not self.link.one_holds:
            return f"the probability of {gate.label} {side}"
        if gate.label is None:
            return (
                f"the best label's probability among the labels {side}, or another best label "
                "where full depth's is above"
            )
        among = "its field's values" if self._of_objects else "the labels"
        return f"the probability of {gate.label} among {among} {side}"
