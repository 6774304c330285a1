"""Probes: how an intermediate hidden state becomes next-token scores and features.

Calibration and serving both go through `Probe`, so that a feature means the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import adainfer_kernels
from adainfer_kernels import ProbeResult
from torch import Tensor

from vllm_adainfer.policy.norm import Norm, NormKind
from vllm_adainfer.policy.shards import VocabularyShards

FEATURES = ("top_prob", "gap")  # the columns of `ProbeResult.features`


@dataclass(frozen=True)
class Probe:
    """What an exit point reads a hidden state with.

    A `label-head` is a head and a bias alone, fitted from the state straight to the labels' final
    scores; `logit-lens` is the model's own final norm and head; `lens` a fitted affine map before
    those, stored whole or, where a matrix of that size is a burden, as a product of two thin ones.

    Attributes:
        head_weight: [n, head size], a row for each token it scores.
        head_bias: [n], or None.
        token_ids: int64 [n], the tokens of the rows; None where row j is token j.
        norm: the model's final norm, None for a label head and a model without one.
        projection: [hidden size, head size] from there to what the head reads, as OPT-350m has
            one; None where that is the same.
        lens_weight: [hidden size, hidden size] of the affine map (what it adds), or None.
        lens_down: [hidden size, rank], instead of `lens_weight`.
        lens_up: [rank, hidden size], goes with `lens_down`.
        lens_bias: [hidden size], goes with either.
        shards: where other ranks have other rows of the head; None where all are here.

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

    @property
    def lens(self) -> dict[str, Tensor]:
        """The parts of the lens that there are, by attribute name."""
        names = "lens_weight", "lens_down", "lens_up", "lens_bias"
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    @property
    def own(self) -> dict[str, Tensor]:
        """What a `logit-lens` consists of, for `logit_lens_of`: the tensors that there are."""
        norm = self.norm
        parts = {
            "head_weight": self.head_weight,
            "projection": self.projection,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def bytes(self) -> int:
        """What the probe stores besides the model's own norm and head."""
        head = () if self.head_bias is None else (self.head_weight, self.head_bias)
        return sum(part.nbytes for part in (*self.lens.values(), *head))

    def of_tokens(self, token_ids: Tensor) -> Probe:
        """The same for some tokens alone, int64 [n]; this one must score all of them."""
        return replace(self, head_weight=self.head_weight[token_ids], token_ids=token_ids)

    def readout(self, hidden: Tensor) -> Tensor:
        """The state that the head is to read, [rows, head size], in the head's dtype."""
        norm, dtype = self.norm, self.head_weight.dtype
        state = adainfer_kernels.readout(
            hidden,
            norm=None if norm is None else norm.kind,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=1.0 if norm is None else norm.eps,
            lens_weight=self.lens_weight if self.lens_down is None else self.lens_down,
            lens_up=self.lens_up,
            lens_bias=self.lens_bias,
            dtype=dtype,
        )
        return state if self.projection is None else state @ self.projection

    def settle(
        self, readout: Tensor, classifier: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which rows are settled, and scores of the probe's tokens; see `adainfer_kernels`."""
        return adainfer_kernels.settle(
            readout,
            self.head_weight,
            head_bias=self.head_bias,
            classifier=classifier,
            threshold=threshold,
        )

    def score(
        self,
        readout: Tensor,
        classifier: Tensor | None = None,
        threshold: Tensor | None = None,
        return_scores: bool = False,
    ) -> ProbeResult:
        """Best token, features, and what else is asked for; see `adainfer_kernels.probe`.

        With `shards` that is the first two: there are scores of a part only, and no decision.
        """
        result = adainfer_kernels.probe(
            readout,
            self.head_weight,
            norm=None,
            head_bias=self.head_bias,
            candidates=self.token_ids,
            classifier=classifier,
            threshold=threshold,
            return_scores=return_scores,
        )
        return result if self.shards is None else self.shards.merged(result)


def logit_lens_of(own: Mapping[str, Tensor], norm: tuple[NormKind, float] | None) -> Probe:
    """A `logit-lens` of its tensors (see `Probe.own`) and kind and epsilon of its norm."""
    return Probe(
        head_weight=own["head_weight"],
        norm=None
        if norm is None
        else Norm(norm[0], own.get("norm_weight"), own.get("norm_bias"), norm[1]),
        projection=own.get("projection"),
    )
