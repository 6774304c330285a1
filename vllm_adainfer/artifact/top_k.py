"""Whether an early order of a query's documents loses one of the first."""

from __future__ import annotations

import numpy as np

from vllm_adainfer.arrays import Floats
from vllm_adainfer.artifact.fields import TopK


def loses_document(early: Floats, full: Floats, top_k: TopK) -> bool:
    """Whether a document of the first `top_k.k` at full depth is not among them early.

    Only those count that lie more than the margin above the document after them. Documents with
    the same score keep their order, as vLLM's ``/rerank`` does.

    Args:
        early: [documents], their early scores; full depth's where none was given.
        full: [documents], their scores at full depth.
        top_k: what is promised.

    """
    if len(full) <= top_k.k:
        return False
    must_stay = full > full[ranked(full)[top_k.k]] + top_k.margin
    must_stay[ranked(early)[: top_k.k]] = False
    return bool(must_stay.any())


def ranked(scores: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[documents], their places in order, the highest score first."""
    return np.argsort(-scores, kind="stable")
