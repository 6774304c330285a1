"""A sample of the requests that their ids decide, so that a repeated run draws the same ones."""

from __future__ import annotations

import hashlib

from vllm_adainfer.engine.compat_requests import client_request_id


def is_sampled(request_id: str, rate: float, purpose: str) -> bool:
    """Whether a request is in the sample of `purpose`, a share `rate` of all.

    Samples of different purposes are independent.
    """
    if not rate:
        return False
    digest = hashlib.sha256(f"{purpose} {client_request_id(request_id)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < rate
