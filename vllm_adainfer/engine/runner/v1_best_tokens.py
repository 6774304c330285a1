"""The likeliest token of each row that its grammar allows, without masking whole rows.

Masking a row of the vocabulary on a CPU costs vLLM several times as much as finding its likeliest
token, and a model that writes an object hardly ever wants a token that the grammar forbids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.engine.compat.drafts import mask_logits

ROWS_AT_ONCE = 16  # converted to float32 in the processor's cache
UNMASKED, UNREAD = -1, -2


def best_tokens(
    logits: Tensor, masks: Any, places: Ints, best_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """The token of each row of `logits` that `best_of` finds in it once it is masked.

    `masks` has bits of tokens in int32 words; `places` says which mask a row has, or `UNMASKED`.
    It is `UNREAD` for rows whose token counts for nothing, which get any.
    """
    [read] = np.nonzero(places != UNREAD)
    if len(read) < len(places):
        every = torch.zeros(len(places), dtype=torch.int64)
        if len(read):
            rows = torch.from_numpy(read)
            every[rows] = best_tokens(logits[rows], masks, places[read], best_of).long()
        return every
    found = torch.cat([best_of(some.float()) for some in logits.split(ROWS_AT_ONCE)])
    tokens = found.numpy()
    allowed = masks[places, tokens >> 5] >> (tokens & 31) & 1
    [forbidden] = np.nonzero((places != UNMASKED) & (allowed == 0))
    if len(forbidden):
        rows = torch.from_numpy(forbidden)
        some = logits[rows].float()
        mask_logits(some, torch.from_numpy(masks[places[forbidden]]))
        found[rows] = best_of(some)
    return found


def mask_places(
    request_ids: Sequence[str], drafts: Mapping[str, Sequence[int]], masked_ids: Sequence[str]
) -> Ints:
    """Which mask each row of the logits has: that of each request, and of each drafted token.

    The masks are those of `masked_ids`, in this order.
    """
    rows = {one: 1 + len(drafts.get(one, ())) for one in (*request_ids, *masked_ids)}
    ends = np.cumsum([rows[one] for one in masked_ids])
    places = {
        one: np.arange(end - rows[one], end) for one, end in zip(masked_ids, ends, strict=True)
    }
    return np.concatenate([places.get(one, np.full(rows[one], UNMASKED)) for one in request_ids])
