"""Label pools: the labels that requests may name, and which of them each request names."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example, find_labels
from vllm_adainfer.promise.label_subsets import MOST_LABELS

# What vLLM's decision endpoints take as labels.
POOLS = {
    "letters": tuple(string.ascii_uppercase),
    "yes-no": ("yes", "no"),
    "digits": tuple(string.digits),
}


def pool_of(names: Sequence[str], examples: Sequence[Example], tokenizer: Any) -> tuple[Label, ...]:
    """The labels of ``--label-pool``, which must hold those of every request.

    `names` are those of `POOLS`, or token ids; a label is the token that follows the first prompt.

    An AdaInferError if a name is unknown, there are too many labels, or a request names another.
    """
    tokens = [int(name) for name in names if name.isdecimal()]
    unknown = [name for name in names if not name.isdecimal() and name not in POOLS]
    if unknown:
        raise AdaInferError(
            f"--label-pool {unknown[0]} is not known: name {', '.join(POOLS)}, or token ids"
        )
    if any(token >= len(tokenizer) for token in tokens):
        raise AdaInferError(
            f"--label-pool {max(tokens)} is no token id of this model: they are below "
            f"{len(tokenizer)}"
        )
    named = dict.fromkeys(label for name in names for label in POOLS.get(name, ()))
    labels = find_labels(tuple(named), examples[0], tokenizer) if named else ()
    found = {label.token_id: label for label in labels}
    for token in tokens:
        found.setdefault(token, Label(name=tokenizer.decode([token]), token_id=token))
    if not 1 < len(found) <= MOST_LABELS:
        raise AdaInferError(f"--label-pool has {len(found)} labels: it takes two to {MOST_LABELS}")
    for example in examples:
        outside = [token for token in example.labels or () if token not in found]
        if outside:
            raise AdaInferError(
                f"{example.place} names the label {tokenizer.decode(outside[:1])!r} (token "
                f"{outside[0]}), which --label-pool does not have: add it"
            )
    return tuple(found.values())


def common_labels(examples: Sequence[Example], tokenizer: Any) -> tuple[Label, ...]:
    """The labels of requests that all name the same ones.

    An AdaInferError if they do not.
    """
    sets = {frozenset(example.labels or ()) for example in examples}
    if len(sets) > 1:
        tokens = ",".join(map(str, sorted(frozenset[int]().union(*sets))))
        raise AdaInferError(
            f"the requests name {len(sets)} different sets of labels: give --label-pool, for "
            f"example letters,yes-no, or the tokens found: --label-pool {tokens}"
        )
    return labels_of(examples[0].labels or (), tokenizer)


def labels_of(tokens: Sequence[int], tokenizer: Any) -> tuple[Label, ...]:
    """Labels that requests name by `tokens` alone: each is called as it is written."""
    return tuple(Label(name=tokenizer.decode([token]), token_id=token) for token in tokens)


def subsets_of(examples: Sequence[Example], label_ids: Sequence[int]) -> Tensor:
    """bool [examples, labels], which labels each request names."""
    return torch.tensor(
        [[token in (example.labels or ()) for token in label_ids] for example in examples]
    )
