"""Fit the guesser: softmax regressions of each field's value on the set of a text's tokens.

Nothing is learnt from the held-out prompts. A prompt that fits gets its guess from the answers to
others, so that heads learn beside guesses as good as those of prompts to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from vllm_adainfer.arrays import AnyArray, Ints
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.record.rows import FOLDS
from vllm_adainfer.offline.progress import say
from vllm_adainfer.policy.guesser import Guesser, own_tokens

NEVER = -1e4  # the score of a value that no answer had
ITERATIONS = 300


def taught(
    prompts: Sequence[Sequence[int]],
    split: Split,
    shared: SharedTokens,
    objects: Objects,
    answers: Ints,
) -> tuple[Guesser, list[Sequence[int]]]:
    """What guesses objects, and its guess for each of `prompts`, in token ids.

    `answers` int64 [prompts that fit, fields] are the places of the values in theirs. Where texts
    tell nothing, all prompts get the commonest object.
    """
    fit, folds = [prompts[row] for row in split.fit], split.units[split.fit] % FOLDS
    learnt = guesses_by_fold(objects, shared, fit, answers, folds)
    all_same = [objects.commonest] * len(fit)
    right, commonest = (
        float(np.mean((np.array(own) == answers).all(axis=1))) for own in (learnt, all_same)
    )
    guesser = fit_guesser(objects, shared, fit, answers)
    if right <= commonest:
        guesser, learnt = Guesser.of_commonest(objects, shared), list(all_same)
    say(f"the object that is guessed behind a prompt is right for {max(right, commonest):.0%}")
    guesses = {row: guesser.places(prompts[row]) for row in split.certify.tolist()}
    guesses |= zip(split.fit.tolist(), learnt, strict=True)
    return guesser, [guesses[row] for row in range(len(prompts))]


def fit_guesser(
    objects: Objects, shared: SharedTokens, prompts: Sequence[Sequence[int]], answers: Ints
) -> Guesser:
    """Learn which objects the model writes after `prompts`.

    `answers` int64 [prompts, fields] are the places of its values.
    """
    texts = [own_tokens(prompt, shared) for prompt in prompts]
    tokens = np.unique(np.concatenate(texts))
    counts = [len(text) for text in texts]
    columns = np.searchsorted(tokens, np.concatenate(texts))
    shape = len(texts), len(tokens)
    read = csr_matrix(
        (np.ones(len(columns)), columns, np.cumsum([0, *counts])), shape=shape, dtype=np.float64
    )
    sizes = objects.link.sizes
    weights = [_of_field(read, answers[:, field], size) for field, size in enumerate(sizes)]
    weight = np.concatenate(weights, axis=1).astype(np.float32)
    digest = blake2b(tokens.tobytes() + weight.tobytes(), digest_size=8).hexdigest()
    known = objects.model_copy(update={"guesser": digest})
    return Guesser(known, shared, tokens, torch.from_numpy(weight))


def _of_field(read: csr_matrix, places: Ints, values: int) -> AnyArray:
    """[tokens + 1, values], the weights of a field's values."""
    weight = np.zeros((read.shape[1] + 1, values))
    weight[-1] = NEVER
    seen = np.unique(places)
    if len(seen) == 1:
        weight[-1, seen] = 0
        return weight
    fitted = LogisticRegression(max_iter=ITERATIONS).fit(read, places)
    # Of two values, scikit-learn fits the odds of the second.
    weight[:-1, seen[-len(fitted.coef_) :]] = fitted.coef_.T
    weight[-1, seen] = 0
    weight[-1, seen[-len(fitted.coef_) :]] = fitted.intercept_
    return weight


def guesses_by_fold(
    objects: Objects,
    shared: SharedTokens,
    prompts: Sequence[Sequence[int]],
    answers: Ints,
    folds: Ints,
) -> list[Sequence[int]]:
    """The guesses for `prompts`, each of a guesser that has not seen its fold, int64 [prompts]."""
    found: list[Sequence[int]] = [()] * len(prompts)
    for fold in np.unique(folds):
        others = np.flatnonzero(folds != fold)
        guesser = fit_guesser(objects, shared, [prompts[one] for one in others], answers[others])
        for one in np.flatnonzero(folds == fold):
            found[one] = guesser.places(prompts[one])
    return found
