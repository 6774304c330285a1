"""Probes: how an intermediate hidden state becomes next-token scores and features.

Calibration and serving both use `Probe`, so a feature means the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import adainfer_kernels
import torch
from adainfer_kernels import Head, Lens, Norm, NormKind, ProbeResult
from torch import Tensor

from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.policy.shards import VocabularyShards


@dataclass(frozen=True)
class Probe:
    """How an exit point reads a hidden state.

    A `label-head` is just a head with a bias, fitted to map the state straight to the labels' final
    scores. A `logit-lens` is the model's own final norm and head. A `lens` is a tuned lens (Belrose
    et al. 2023, arXiv 2303.08112), which puts a fitted affine map before those; a map that would be
    too large to store is kept as the product of two thin matrices.

    Attributes:
        head: one row for each token it scores.
        token_ids: int64 [n], the tokens of the rows; None where row j is token j.
        norm: the model's final norm; None for a label head and for a model without one.
        projection: [hidden size, head size], applied after the norm, as in OPT-350m; None where
            the head reads the normed state itself.
        lens: applied before the norm; None for none.
        shards: joins the results of ranks that hold other rows of the head; None where this
            probe has all the rows.

    """

    head: Head
    token_ids: Tensor | None = None
    norm: Norm | None = None
    projection: Tensor | None = None
    lens: Lens | None = None
    shards: VocabularyShards | None = None

    @property
    def fitted_tensors(self) -> dict[str, Tensor]:
        """The tensors that calibration has fitted, by their names in an artifact."""
        tensors: dict[str, Tensor | None] = {}
        if self.head.bias is not None:  # a label head
            tensors = {"head_weight": self.head.weight, "head_bias": self.head.bias}
        elif self.lens is not None:
            tensors = {"lens_weight": self.lens.weight, "lens_bias": self.lens.bias}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def model_tensors(self) -> dict[str, Tensor]:
        """The model's own tensors, those of a `logit-lens`, as `logit_lens_of` takes them."""
        norm = self.norm
        tensors = {
            "head_weight": self.head.weight,
            "projection": self.projection,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def bytes(self) -> int:
        """The bytes that the probe stores besides the model's own norm and head."""
        return sum(tensor.nbytes for tensor in self.fitted_tensors.values())

    def of_tokens(self, token_ids: Tensor) -> Probe:
        """The same probe for these tokens alone, int64 [n]; `self` must score the vocabulary."""
        return replace(self, head=self.head.of_rows(token_ids), token_ids=token_ids)

    def readout(self, hidden: Tensor) -> Tensor:
        """The state that the head reads, [rows, head size], in the head's dtype."""
        dtype = self.head.weight.dtype
        state = adainfer_kernels.readout(hidden, self.norm, self.lens, dtype=dtype)
        return state if self.projection is None else state @ self.projection

    def settle(
        self, readout: Tensor, classifier: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which rows are settled, and their scores; see `adainfer_kernels.settle`."""
        return adainfer_kernels.settle(readout, self.head, classifier, threshold)

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
            self.head,
            candidates=self.token_ids,
            classifier=classifier,
            threshold=threshold,
            return_scores=return_scores,
        )
        return result if self.shards is None else self.shards.merged(result)


@dataclass(frozen=True)
class LabelHead:
    """Scores the labels from a state; calibration and serving both use it.

    For probabilities it has one more row, for the log-odds of the label mass (the labels' share of
    the whole vocabulary's probability).

    Attributes:
        weight: fp32 [labels or labels + 1, hidden size, or twice that for a pooled head].
        bias: fp32 [labels or labels + 1].
        token_ids: int64 [labels].

    """

    weight: Tensor
    bias: Tensor
    token_ids: Tensor

    @property
    def reads_mass(self) -> bool:
        """Whether the last score is that of the label mass."""
        return len(self.bias) > len(self.token_ids)

    @property
    def fitted_tensors(self) -> dict[str, Tensor]:
        """The tensors that calibration has fitted, by their names in an artifact."""
        return {"head_weight": self.weight, "head_bias": self.bias}

    @property
    def bytes(self) -> int:
        """Bytes that the head stores."""
        return self.weight.nbytes + self.bias.nbytes

    def score(self, hidden: Tensor, subsets: Tensor | None = None) -> Tensor:
        """Scores fp32 [rows, labels or labels + 1] of states, see `UndecidedRows.hidden`.

        `subsets`, bool [rows, labels], are the labels that each row's request names; others get
        -inf. None: all.
        """
        return restrict(torch.addmm(self.bias, hidden.float(), self.weight.T), subsets)


def lens_of(tensors: Mapping[str, Tensor]) -> Lens | None:
    """The lens among `Probe.fitted_tensors`, None if there is none."""
    weight = tensors.get("lens_weight")
    return None if weight is None else Lens(weight, tensors["lens_bias"])


def logit_lens_of(tensors: Mapping[str, Tensor], norm: tuple[NormKind, float] | None) -> Probe:
    """A `logit-lens` from its tensors (`Probe.model_tensors`) and its norm's kind and epsilon."""
    return Probe(
        head=Head(tensors["head_weight"]),
        norm=None
        if norm is None
        else Norm(norm[0], tensors.get("norm_weight"), tensors.get("norm_bias"), norm[1]),
        projection=tensors.get("projection"),
    )
