"""Probes: how an intermediate hidden state becomes next-token scores and features.

Calibration and serving both use `Probe`, so a feature means the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import adainfer_kernels
from adainfer_kernels import Head, Lens, Norm, NormKind, ProbeResult
from torch import Tensor

from vllm_adainfer.policy.shards import VocabularyShards

FEATURES = ("top_prob", "gap")  # the columns of `ProbeResult.features`


@dataclass(frozen=True)
class Probe:
    """How an exit point reads a hidden state.

    A `label-head` is just a head and a bias, fitted to map the state straight to the labels' final
    scores. A `logit-lens` is the model's own final norm and head. A `lens` puts a fitted affine map
    before those; a map that would be too large to store is kept as the product of two thin
    matrices.

    Attributes:
        head_weight: [n, head size], one row for each token it scores.
        head_bias: [n], or None.
        token_ids: int64 [n], the tokens of the rows; None where row j is token j.
        norm: the model's final norm; None for a label head and for a model without one.
        projection: [hidden size, head size], applied after the norm, as in OPT-350m; None where
            the head reads the normed state itself.
        lens_weight: [hidden size, hidden size] of the affine map (what it adds), or None.
        lens_down: [hidden size, rank], instead of `lens_weight`.
        lens_up: [rank, hidden size], goes with `lens_down`.
        lens_bias: [hidden size], goes with either.
        shards: joins the results of ranks that hold other rows of the head; None where this
            probe has all the rows.

    """

    head_weight: Tensor
    head_bias: Tensor | None = None
    token_ids: Tensor | None = None
    norm: Norm | None = None
    projection: Tensor | None = None
    lens_weight: Tensor | None = None
    lens_down: Tensor | None = None
    lens_up: Tensor | None = None
    lens_bias: Tensor | None = None
    shards: VocabularyShards | None = None

    @cached_property
    def _head(self) -> Head:
        return Head(self.head_weight, self.head_bias)

    @cached_property
    def _lens(self) -> Lens | None:
        weight = self.lens_weight if self.lens_down is None else self.lens_down
        return None if weight is None else Lens(weight, self.lens_up, self.lens_bias)

    @property
    def lens(self) -> dict[str, Tensor]:
        """The tensors of the lens that are not None, by attribute name."""
        names = "lens_weight", "lens_down", "lens_up", "lens_bias"
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def model_tensors(self) -> dict[str, Tensor]:
        """The model's own tensors, those of a `logit-lens`, as `logit_lens_of` takes them."""
        norm = self.norm
        tensors = {
            "head_weight": self.head_weight,
            "projection": self.projection,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def bytes(self) -> int:
        """What the probe stores besides the model's own norm and head."""
        head = () if self.head_bias is None else (self.head_weight, self.head_bias)
        return sum(tensor.nbytes for tensor in (*self.lens.values(), *head))

    def of_tokens(self, token_ids: Tensor) -> Probe:
        """The same probe for these tokens alone, int64 [n]; `self` must score the vocabulary."""
        return replace(self, head_weight=self.head_weight[token_ids], token_ids=token_ids)

    def readout(self, hidden: Tensor) -> Tensor:
        """The state that the head reads, [rows, head size], in the head's dtype."""
        state = adainfer_kernels.readout(
            hidden, self.norm, self._lens, dtype=self.head_weight.dtype
        )
        return state if self.projection is None else state @ self.projection

    def settle(
        self, readout: Tensor, classifier: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which rows are settled, and their scores; see `adainfer_kernels.settle`."""
        return adainfer_kernels.settle(readout, self._head, classifier, threshold)

    def score(
        self,
        readout: Tensor,
        classifier: Tensor | None = None,
        threshold: Tensor | None = None,
        return_scores: bool = False,
    ) -> ProbeResult:
        """Best token, features, and optionally decisions and scores; see `adainfer_kernels.probe`.

        With `shards`, only the best token and the features: a rank scores its own rows alone, and
        cannot decide from them.
        """
        result = adainfer_kernels.probe(
            readout,
            self._head,
            candidates=self.token_ids,
            classifier=classifier,
            threshold=threshold,
            return_scores=return_scores,
        )
        return result if self.shards is None else self.shards.merged(result)


def logit_lens_of(tensors: Mapping[str, Tensor], norm: tuple[NormKind, float] | None) -> Probe:
    """A `logit-lens` from its tensors (`Probe.model_tensors`) and its norm's kind and epsilon."""
    return Probe(
        head_weight=tensors["head_weight"],
        norm=None
        if norm is None
        else Norm(norm[0], tensors.get("norm_weight"), tensors.get("norm_bias"), norm[1]),
        projection=tensors.get("projection"),
    )
