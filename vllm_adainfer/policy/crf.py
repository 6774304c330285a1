"""A linear-chain CRF over a request's exit points (AdaInfer's second choice of classifier).

Two states an exit point, settled or not; emissions are linear in its features, transitions its
own (exit points are not evenly spaced). Fitted here rather than by sklearn-crfsuite, which is kept
up but reads features as dictionaries of strings, keeps its model in a file of its own, shares the
transitions of all steps, and would still leave the forward algorithm to us: a dependency for what
scipy's L-BFGS does with the twenty lines below.

Serving knows the exit points so far and no later ones, so what is fitted is the likelihood of
every prefix of the chain (each is a CRF of its own, so the loss stays convex). The likelihood of
the whole chain alone does not say how likely a state is before the rest is seen: moving a
potential from a state's emission to the transitions out of it leaves it unchanged.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import logsigmoid

from vllm_adainfer.policy.classifier import INVERSE_PENALTY
from vllm_adainfer.policy.score import CHAIN_SHAPE, score


def fit_crf(features: Tensor, settled: npt.NDArray[np.bool_]) -> list[Tensor]:
    """Fit the chain, by maximum likelihood with an L2 penalty on all its weights.

    Args:
        features: fp32 [rows, exit points, 2].
        settled: [rows, exit points], True where the probe's best token is the full model's.

    Returns:
        for each exit point its step, as `score` serves it: fp32 [7].

    """
    x, y = features.double(), torch.from_numpy(settled)
    shape = (x.shape[1], *CHAIN_SHAPE)

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        steps = torch.from_numpy(flat).reshape(shape).requires_grad_()
        value = steps.square().sum() / (2 * INVERSE_PENALTY) - _log_likelihood(x, y, steps)
        value.backward()
        assert steps.grad is not None
        return value.item(), steps.grad.numpy().ravel()

    found = minimize(loss, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B")
    return list(torch.from_numpy(found.x).float().reshape(shape))


def _log_likelihood(x: Tensor, settled: Tensor, steps: Tensor) -> Tensor:
    """Of every prefix of every row's chain, summed.

    A prefix's likelihood is that of its last state given all features, as served, times that of
    each earlier state given the next.
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
