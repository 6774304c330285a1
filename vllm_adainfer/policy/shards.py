"""Probes over an LM head whose rows are spread over several ranks (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from adainfer_kernels import ProbeResult, merge
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShards:
    """Joins the probe results of ranks that hold different rows of the LM head.

    Attributes:
        gather: collects a tensor [...] from every rank into [ranks, ...], the same on each rank;
            a collective operation.

    """

    gather: Callable[[Tensor], Tensor]

    def merged(self, shard: ProbeResult) -> ProbeResult:
        """This rank's result merged with those of all other ranks; the same on each rank."""
        # Ids travel as the bits of floats, so that one collective carries everything.
        ids = shard.top1_id.to(torch.int32).view(torch.float32)
        shards = self.gather(torch.stack([ids, shard.top1, shard.top2, shard.lse]))
        return merge(
            [
                ProbeResult(ids.contiguous().view(torch.int32).long(), top1, top2, lse)
                for ids, top1, top2, lse in shards.unbind()
            ]
        )
