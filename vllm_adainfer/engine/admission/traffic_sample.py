"""Random samples of the requests, which no client can influence."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

# Clients choose part of a request's id (X-Request-Id), so a secret goes into the draw, too. Only
# the scheduler's process draws, so the secret is never shared.
SECRET = secrets.token_bytes(32)
TOGETHER_SECONDS = 60.0  # in which the parts of a group arrive
MOST_GROUPS = 10_000  # that are remembered


def in_traffic_sample(request_id: str, rate: float, purpose: str) -> bool:
    """Whether a request is in the sample for `purpose`, a fraction `rate` of all requests.

    Samples for different purposes are independent.
    """
    if not rate:
        return False
    text = f"{purpose} {request_id}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, key=SECRET).digest()
    return int.from_bytes(digest, "big") / 2**64 < rate


class GroupSample:
    """A sample of groups of requests: all of a group are in it, or none.

    The draw is that of the first request, whose id ends in vLLM's random digits: the group's id is
    the client's own choice. So a group that goes on for longer than its parts take to arrive is
    drawn anew.
    """

    def __init__(
        self, rate: float, purpose: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Draw a fraction `rate` of the groups for `purpose`; `clock` is in seconds."""
        self._rate, self._purpose, self._clock = rate, purpose, clock
        self._drawn: OrderedDict[str, tuple[float, bool]] = OrderedDict()  # oldest first

    def has(self, request_id: str, group: str | None) -> bool:
        """Whether a request is in the sample; `group` is None for one that stands alone."""
        if group is None or not self._rate:
            return in_traffic_sample(request_id, self._rate, self._purpose)
        now = self._clock()
        drawn_at, found = self._drawn.get(group, (-float("inf"), False))
        if now - drawn_at <= TOGETHER_SECONDS:
            return found
        found = in_traffic_sample(request_id, self._rate, self._purpose)
        self._drawn[group] = now, found
        self._drawn.move_to_end(group)
        if len(self._drawn) > MOST_GROUPS:
            self._drawn.popitem(last=False)
        return found
