"""Exit points whose probe was trained, a student or branches: judged by what it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.classifier import fit_classifier
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Judged, Scored
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
    rows, target = calibration.rows, calibration.target
    fit, held_out = calibration.fitted, calibration.held_out

    def judged(scores: Tensor, where: Ints) -> Judged:
        early = answers_of_scores(trained.probe.head, scores, target.gates)
        full = rows.tokens[where]
        return Judged.of(early, full, calibration.loss(early, full, where))

    unseen = judged(restrict(trained.unseen, target.subsets_of(fit)), fit)
    asked = trained.asked(rows.prompts[fit])
    features = unseen.features[torch.from_numpy(asked)]
    settled = target.settled(unseen.agrees, unseen.loss)[asked]
    seed = calibration.options.seed
    classifier = fit_classifier(calibration.linear, features, settled, seed, target.features)
    if classifier is None:
        return None
    fitted = classifier

    def scored(answers: Judged, where: Ints) -> Scored:
        found = answers.scored(fitted).never_at(target.never_settled)
        never = torch.from_numpy(~trained.asked(rows.prompts[where]))
        return replace(found, score=found.score.masked_fill(never, -torch.inf))

    scores = trained.scores(rows.prompts[held_out], target.subsets_of(held_out))
    held = scored(judged(scores, held_out), held_out)
    return FittedExit(trained.layer, trained.probe, classifier, scored(unseen, fit), held)
