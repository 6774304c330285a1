"""Probes: how an exit point scores tokens from what it reads.

Calibration and serving both use `Probe`, so a feature means the same in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import adainfer_kernels
import numpy as np
import torch
from adainfer_kernels import Head, Lens, Norm, NormKind, ProbeResult
from torch import Tensor, nn

from vllm_adainfer.arrays import Ints
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.text_encoders import TextEncoder
from vllm_adainfer.promise.label_subsets import restrict

NO_LENS: Ints = np.arange(0)


@dataclass(frozen=True, eq=False)
class Probe:
    """How an exit point scores tokens: perhaps an encoder, then a head.

    A `label-head` is a head with a bias, fitted to map what is read straight to the labels' final
    scores: the state of the last token, or of a whole prompt; or what the encoder of a branch or of
    a student makes of it. A `logit-lens` is the model's own final norm and head. A `lens` is a
    tuned lens (Belrose et al. 2023, arXiv 2303.08112), which puts a fitted affine map before those.

    Attributes:
        head: one row for each token it scores. For probabilities a label head has one more, for the
            log-odds of the label mass (the labels' share of the whole vocabulary's probability).
        token_ids: int64 [n], the tokens of the rows; None where row j is token j.
        norm: the model's final norm; None for a label head and for a model without one.
        projection: [hidden size, head size], applied after the norm, as in OPT-350m; None where
            the head reads the normed state itself.
        lens: applied before the norm; None for none.
        gather: where ranks hold other rows of the head, collects a tensor [...] from every rank
            into [ranks, ...], the same on each rank; a collective operation. None where this probe
            has all the rows.
        encoder: makes the state that the head reads; None where it reads states of the model.
        columns: of an object, how many labels each field has; the head reads the row of each field
            for its own. Empty where all labels are read at one row.
        fused: whether a kernel reduces the scores to features; else a promise reads all of them.

    """

    head: Head
    token_ids: Tensor | None = None
    norm: Norm | None = None
    projection: Tensor | None = None
    lens: Lens | None = None
    gather: Callable[[Tensor], Tensor] | None = None
    encoder: StateEncoder | TextEncoder | None = None
    columns: tuple[int, ...] = ()
    fused: bool = True

    @property
    def reads_mass(self) -> bool:
        """Whether the last score is that of the label mass."""
        return self.token_ids is not None and self.head.size > len(self.token_ids)

    @property
    def fitted_tensors(self) -> dict[str, Tensor]:
        """The fitted tensors, by their names in an artifact; a student's encoder has own files."""
        tensors: dict[str, Tensor] = {}
        if self.head.bias is not None:  # a label head
            tensors = {"head_weight": self.head.weight, "head_bias": self.head.bias}
        elif self.lens is not None and self.lens.bias is not None:
            tensors = {"lens_weight": self.lens.weight, "lens_bias": self.lens.bias}
        if isinstance(self.encoder, StateEncoder):
            tensors |= {f"branch.{name}": one for name, one in self.encoder.state_dict().items()}
        return tensors

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
        stored = [*self.fitted_tensors.values()]
        if isinstance(self.encoder, TextEncoder):
            stored += self.encoder.state_dict().values()
        return sum(tensor.nbytes for tensor in stored)

    def on(self, device: torch.device) -> Probe:
        """The same probe on a device; a copy unless it is there."""
        if self.head.weight.device.type == device.type:
            return self
        copied: Probe = moved(self, device)
        return copied

    def of_tokens(self, token_ids: Tensor) -> Probe:
        """The same probe for these tokens alone, int64 [n]; `self` must score the vocabulary."""
        return replace(self, head=self.head.of_rows(token_ids), token_ids=token_ids)

    def readout(self, hidden: Tensor) -> Tensor:
        """The state that the head reads, [rows, head size], in the head's dtype."""
        dtype = self.head.weight.dtype
        state = adainfer_kernels.readout(hidden, self.norm, self.lens, dtype=dtype)
        return state if self.projection is None else state @ self.projection

    def score(
        self,
        readout: Tensor,
        classifier: Tensor | None = None,
        threshold: Tensor | None = None,
        return_scores: bool = False,
    ) -> ProbeResult:
        """Best token, features, and optionally decisions and scores; see `adainfer_kernels.probe`.

        With `gather`, only the best token and the features: a rank scores its own rows alone, and
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
        return result if self.gather is None else merged(result, self.gather)

    def project(self, states: Tensor) -> Tensor:
        """[rows, width], what a branch keeps of each token's state [rows, hidden size]."""
        assert isinstance(self.encoder, StateEncoder), "other probes keep states as they are"
        return self.encoder.projected(states)

    def label_scores(
        self,
        hidden: Tensor,
        subsets: Tensor | None = None,
        lens: Ints = NO_LENS,
        texts: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """All scores of a label head, fp32 [rows, head rows].

        `hidden`, `lens` and `texts` are those of `UndecidedRows`. `subsets`, bool [rows, labels],
        are the labels that each row's request names; others get -inf. None: all.
        """
        encoder, bias = self.encoder, self.head.bias
        read = hidden if encoder is None else encoder.read(hidden, lens, texts)
        assert bias is not None, "label heads have one"
        if read.dim() == 3:
            return self._scores_of_fields(read.float(), bias)
        return restrict(torch.addmm(bias, read.float(), self.head.weight.T), subsets)

    def _scores_of_fields(self, read: Tensor, bias: Tensor) -> Tensor:
        """Each field's scores of its own row; `read` is fp32 [rows, fields, width].

        That of the label mass, if there is one, is read at the last row.
        """
        *sizes, last = self.columns
        sizes.append(last + self.head.size - sum(self.columns))
        parts = zip(read.unbind(1), bias.split(sizes), self.head.weight.split(sizes), strict=True)
        return torch.cat([torch.addmm(own, row, weight.T) for row, own, weight in parts], dim=1)


def moved(part: Any, device: torch.device) -> Any:
    """A copy on `device` of a tensor, a module, or a dataclass of such; other values are shared."""
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, nn.Module):
        return copy.deepcopy(part).to(device)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    own = {one.name: moved(getattr(part, one.name), device) for one in fields(part)}
    return replace(part, **own)


def merged(shard: ProbeResult, gather: Callable[[Tensor], Tensor]) -> ProbeResult:
    """This rank's result merged with those of all other ranks; see `Probe.gather`."""
    # Ids travel as the bits of floats, so that one collective carries everything.
    ids = shard.top1_id.to(torch.int32).view(torch.float32)
    shards = gather(torch.stack([ids, shard.top1, shard.top2, shard.lse]))
    return adainfer_kernels.merge(
        [
            ProbeResult(ids.contiguous().view(torch.int32).long(), top1, top2, lse)
            for ids, top1, top2, lse in shards.unbind()
        ]
    )


def logit_lens_of(tensors: Mapping[str, Tensor], norm: tuple[NormKind, float] | None) -> Probe:
    """A `logit-lens` from its tensors (`Probe.model_tensors`) and its norm's kind and epsilon."""
    return Probe(
        head=Head(tensors["head_weight"]),
        norm=None
        if norm is None
        else Norm(norm[0], tensors.get("norm_weight"), tensors.get("norm_bias"), norm[1]),
        projection=tensors.get("projection"),
    )
