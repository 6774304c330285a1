"""Probes over an LM head whose rows are spread over several ranks (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from adainfer_kernels import ProbeResult, merge
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShards:
    """Ranks that hold different rows of the LM head, and what they have found there.

    Attributes:
        gather: from [...] of this rank to [ranks, ...] of all, the same on each; a collective.

    """

    gather: Callable[[Tensor], Tensor]

    def merged(self, part: ProbeResult) -> ProbeResult:
        """This rank's part of a probe and all others', joined; the same on each rank."""
        ids = part.top1_id.to(torch.int32).view(torch.float32)  # travel as they are, bit for bit
        parts = self.gather(torch.stack([ids, part.top1, part.top2, part.lse]))
        return merge(
            [
                ProbeResult(ids.contiguous().view(torch.int32).long(), top1, top2, lse)
                for ids, top1, top2, lse in parts.unbind()
            ]
        )
