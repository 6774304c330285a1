"""Exit points whose probe was trained, a student or branches: judged by what it has not seen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Judged, fit_exit
from vllm_adainfer.offline.calibration.fit.probes import answers_of_scores


def with_trained(calibration: Calibration, heads: Sequence[FittedExit]) -> list[FittedExit]:
    """The candidates: `heads` with what was trained for a calibration.

    A student takes the place of a head before the first layer; a branch stands beside its layer's
    head. A probe whose classifier cannot be learned is left out.
    """
    taken = {0} & {one.layer for one in calibration.trained}
    found = [head for head in heads if head.layer not in taken]
    trained = (_fit_exit(calibration, one) for one in calibration.trained)
    found += [exit for exit in trained if exit is not None]
    return sorted(found, key=lambda exit: exit.layer)


def _fit_exit(calibration: Calibration, trained: TrainedProbe) -> FittedExit | None:
    rows, target, held_out = calibration.rows, calibration.target, calibration.held_out

    def judged(scores: Tensor, where: Ints) -> Judged:
        early = answers_of_scores(trained.probe.head, scores, target.gates)
        full = rows.tokens[where]
        return Judged.of(early, full, calibration.loss(early, full, where))

    unseen = restrict(trained.unseen, target.subsets_of(calibration.fitted))
    scores = trained.scores(rows.prompts[held_out], target.subsets_of(held_out))
    return fit_exit(
        calibration,
        trained.layer,
        trained.probe,
        judged(unseen, calibration.fitted),
        judged(scores, held_out),
        trained.asked,
    )
