"""Answers of exit points with scores that are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored

SAFE, UNSAFE = 3, 7


def scored(
    score: Any, tokens: Any, full: Any = 0, loss: Any = None, relevance: Any = None
) -> Scored:
    """Rows of these scores and answers; each answer that is not full depth's loses 1."""
    answers = np.asarray(tokens, dtype=np.int64)
    wanted = np.broadcast_to(np.asarray(full, dtype=np.int64), answers.shape)
    lost = (answers != wanted) if loss is None else loss
    return Scored(
        torch.zeros(len(answers), 2),
        answers,
        wanted,
        np.array(lost, dtype=np.float64),
        torch.as_tensor(score),
        relevance=relevance,
    )


def fitted_exits(
    layers: Sequence[int], fitted: Sequence[Scored], held_out: Sequence[Scored]
) -> list[FittedExit]:
    """Exit points of which only the answers of both halves are known."""
    nothing: Any = None
    pairs = zip(layers, fitted, held_out, strict=True)
    return [FittedExit(layer, nothing, torch.zeros(3), *halves) for layer, *halves in pairs]


def safe_or_not(generator: np.random.Generator, full: Any, worst: float) -> Scored:
    """An exit point that errs less the surer it is, and more often about the unsafe."""
    score = generator.random(len(full))
    errs = generator.random(len(full)) < worst * (1 - score) * np.where(full == UNSAFE, 1.5, 0.7)
    return scored(score, np.where(errs, SAFE + UNSAFE - full, full), full)
