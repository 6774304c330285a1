"""When the trainer tries to certify a policy: at so many recorded rows of a kind."""

from __future__ import annotations

TRIES = (1_500, 3_000, 6_000)
MOST_ROWS = TRIES[-1]  # after which a kind is not recorded any more
