"""Random samples of the requests, which no client can influence."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict

from vllm_adainfer.engine.compat.requests import LONGEST, begins_group

# Clients choose part of a request's id (X-Request-Id), so a secret goes into the draw, too. Only
# the scheduler's process draws, so the secret is never shared.
SECRET = secrets.token_bytes(32)
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

    The draw is that of the group's first request, whose id ends in vLLM's random digits: the
    group's id is the client's own choice. A client that uses an id again begins another group,
    which is drawn anew.
    """

    def __init__(self, rate: float, purpose: str) -> None:
        """Draw a fraction `rate` of the groups for `purpose`."""
        self._rate, self._purpose = rate, purpose
        self._first: OrderedDict[str, str] = OrderedDict()  # by group, the oldest group first

    def has(self, request_id: str, group: str | None) -> bool:
        """Whether a request is in the sample; `group` is None for one that stands alone."""
        if not self._rate:
            return False
        first = self.first_of(request_id, group)
        return in_traffic_sample(first, self._rate, self._purpose)

    def first_of(self, request_id: str, group: str | None) -> str:
        """The request that the group of `request_id` began with; of a long id the end."""
        if group is None:
            return request_id
        if begins_group(request_id) or group not in self._first:
            self._first[group] = request_id[-LONGEST:]
            self._first.move_to_end(group)
            if len(self._first) > MOST_GROUPS:
                self._first.popitem(last=False)
        return self._first[group]
