"""A random sample of the requests, which no client can steer."""

from __future__ import annotations

import hashlib
import secrets

# Clients choose a part of a request's id (X-Request-Id), so the draw depends on a secret, too. It
# is that of the scheduler's process, which alone draws.
SECRET = secrets.token_bytes(32)


def is_sampled(request_id: str, rate: float, purpose: str) -> bool:
    """Whether a request is in the sample of `purpose`, a share `rate` of all.

    Samples of different purposes are independent.
    """
    if not rate:
        return False
    text = f"{purpose} {request_id}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, key=SECRET).digest()
    return int.from_bytes(digest, "big") / 2**64 < rate
