"""Fit the classifier of one exit point with scikit-learn: features in, "settled" score out.

The fit becomes the linear form that `score` evaluates. `crf` fits all exit points together.

A linear-chain CRF over a request's exit points (AdaInfer's second choice of classifier).

Each exit point has two states, settled or not. Its emissions are linear in its features, and it
has its own transitions, because exit points are not evenly spaced. sklearn-crfsuite is maintained,
but it reads features as dictionaries of strings, stores its model in a file, shares transitions
between all steps, and has no forward algorithm that we could serve. scipy's L-BFGS and the twenty
lines below do the same without that dependency.

Serving knows only the exit points so far, so the fit maximises the likelihood of every prefix of
the chain (each prefix is a CRF, so the loss stays convex). The likelihood of the whole chain alone
does not determine the probability of a state given the exit points so far: a potential can move
from a state's emission to the transitions out of it without changing that likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn.functional import logsigmoid

from vllm_adainfer.artifact.kinds import ClassifierKind
from vllm_adainfer.artifact.tensors import served_shape
from vllm_adainfer.policy.score import score
from vllm_adainfer.promise.probabilities import FEATURES

INVERSE_PENALTY = 100.0  # scikit-learn's C


def fit_classifier(
    kind: ClassifierKind,
    features: Tensor,
    settled: npt.NDArray[np.bool_],
    seed: int,
    names: Sequence[str] = FEATURES,
) -> Tensor | None:
    """Fit a classifier on the rows of one exit point.

    Args:
        kind: ``svm`` (linear, Platt-scaled on folds; AdaInfer's choice), ``logreg``, or
            ``threshold``, whose score is the gap itself (as in CALM, arXiv 2207.07061) or the
            distance from a gate. For ``crf`` use `fit_crf`.
        features: fp32 [rows, n].
        settled: [rows], True where the probe's answer is as good as the full model's.
        seed: the solver's seed.
        names: the names of the features, [n].

    Returns:
        fp32 [n + 1], weights and bias; None if the rows do not suffice to fit (no row is settled,
        or only one is in the rarer class).

    """
    if kind == "threshold":
        return torch.tensor([float(name in ("gap", "gate_distance")) for name in names] + [0.0])
    if settled.all():
        # Every row is settled: take the odds from the rule of succession.
        odds = torch.tensor([len(settled) + 1.0]).log()
        return torch.cat([torch.zeros(len(names)), odds])
    folds = min(5, int(settled.sum()), int((~settled).sum()))
    if folds < 2:
        return None
    x = features.double().numpy()
    if kind == "logreg":
        model = LogisticRegression(C=INVERSE_PENALTY, random_state=seed).fit(x, settled)
        return torch.tensor([*model.coef_[0], model.intercept_[0]], dtype=torch.float32)
    svm = LinearSVC(class_weight="balanced", random_state=seed)
    scaled = CalibratedClassifierCV(svm, method="sigmoid", ensemble=False, cv=folds)
    [fitted] = scaled.fit(x, settled).calibrated_classifiers_
    [platt] = fitted.calibrators
    # P(settled) = 1 / (1 + exp(a * decision + b)), so the log odds are linear in the decision.
    plane = np.append(fitted.estimator.coef_[0], fitted.estimator.intercept_[0]) * -platt.a_
    plane[-1] -= platt.b_
    return torch.from_numpy(plane).float()


def fit_crf(features: Tensor, settled: npt.NDArray[np.bool_]) -> list[Tensor]:
    """Fit the chain by maximum likelihood, with an L2 penalty on all its weights.

    `features` are fp32 [rows, exit points, n]; `settled` [rows, exit points] is as for
    `fit_classifier`. Returns the step of each exit point, in the form `score` reads: fp32 [n + 5].
    """
    x, y = features.double(), torch.from_numpy(settled)
    shape = (x.shape[1], *served_shape("crf", x.shape[2]))

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        steps = torch.from_numpy(flat).reshape(shape).requires_grad_()
        value = steps.square().sum() / (2 * INVERSE_PENALTY) - _log_likelihood(x, y, steps)
        value.backward()
        assert steps.grad is not None
        return value.item(), steps.grad.numpy().ravel()

    found = minimize(loss, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B")
    return list(torch.from_numpy(found.x).float().reshape(shape))


def _log_likelihood(x: Tensor, settled: Tensor, steps: Tensor) -> Tensor:
    """Log-likelihood, summed over every prefix of every row's chain.

    The likelihood of a prefix is that of its last state given all features, as served, times that
    of each earlier state given the next.
    """
    sign = 2.0 * settled - 1
    total, earlier = x.new_zeros(()), x.new_zeros(len(x))
    memory: Tensor | None = None
    for index, step in enumerate(steps.unbind()):
        if memory is not None:
            next_says = (step[2:4] - step[:2])[settled[:, index].long()]
            earlier = earlier + logsigmoid(sign[:, index - 1] * (memory + next_says))
        memory = score(x[:, index], step, memory)
        total = total + (earlier + logsigmoid(sign[:, index] * memory)).sum()
    return total
