"""Random samples of the requests, which no client can influence."""

from __future__ import annotations

import hashlib
import secrets

# Clients choose part of a request's id (X-Request-Id), so a secret goes into the draw, too. Only
# the scheduler's process draws, so the secret is never shared.
SECRET = secrets.token_bytes(32)


def in_traffic_sample(request_id: str, rate: float, purpose: str) -> bool:
    """Whether a request is in the sample for `purpose`, a fraction `rate` of all requests.

    Samples for different purposes are independent.
    """
    if not rate:
        return False
    text = f"{purpose} {request_id}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, key=SECRET).digest()
    return int.from_bytes(digest, "big") / 2**64 < rate
