"""The policies that the trainer has certified: read and built on a thread, ready to be served."""

from __future__ import annotations

import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.worker.served_policies import Built, ServedPolicies

logger = get_logger(__name__)

SECONDS, MOST_SECONDS = 60.0, 3600.0  # until a policy is tried again, the first time and at most


class OwnPolicies:
    """Reads ``current.json`` when it has changed.

    Attributes:
        current: by kind, the number of its policy, if that is there.

    """

    def __init__(self, directory: AutoDirectory, served: ServedPolicies) -> None:
        """`served` builds what is read in `directory`."""
        self._directory, self._served = directory, served
        self._read: dict[str, int] = {}  # the numbers of the policies that were read last
        # By kind and number: until when one that failed waits, and after how many seconds.
        self._waits: dict[tuple[str, int], tuple[float, float]] = {}
        self._seen: tuple[int, int] | None = None
        self.current: dict[str, int] = {}
        self._look()

    def read(self, kinds: Container[str]) -> Built:
        """The policies of `kinds` that are new since the last call.

        One that cannot be served is left out and retried later: perhaps the disk was at fault.
        """
        self._look()
        built: Built = {}
        for kind, number in self.current.items():
            if kind not in kinds or self._read.get(kind) == number or self._waits_on(kind, number):
                continue
            self._read[kind] = number
            try:
                artifact = load_artifact(str(self._directory.policy(kind, number)))
                built = {**built, **self._served.build({kind: artifact})}
            except Exception as error:  # whatever is wrong with it, serving goes on
                self.quarantine(kind, error)
            else:
                self._tell_serving(kind, number)
        return built

    def _look(self) -> None:
        """Note what the trainer has said."""
        try:
            stat = self._directory.current.stat()
        except OSError:
            return
        seen = stat.st_mtime_ns, stat.st_ino
        if seen != self._seen:
            self._seen, found = seen, read_json(self._directory.current)
            if isinstance(found, dict):
                self.current = {
                    kind: number
                    for kind, number in found.items()
                    if self._directory.policy(kind, number).is_dir()  # or its kind was forgotten
                }

    def _waits_on(self, kind: str, number: int) -> bool:
        """Whether a policy that could not be served is not to be tried again yet."""
        return time.monotonic() < self._waits.get((kind, number), (0.0, 0.0))[0]

    def _tell_serving(self, kind: str, number: int) -> None:
        with suppress(OSError):
            self._bad(kind).unlink(missing_ok=True)
        self._directory.tell(kind, "serving", policy=number)

    def _bad(self, kind: str) -> Path:
        return self._directory.root / kind / "bad.json"

    def quarantine(self, kind: str, error: Exception) -> None:
        """Do not serve the new policy of a kind; its old one, if any, stays in service.

        The new one is retried later. The reason may quote client input, so it is written to the
        directory alone.
        """
        number = self.current.get(kind)
        if number is None:  # the kind has lost its place meanwhile
            return
        self._read.pop(kind, None)
        _, waited = self._waits.get((kind, number), (0.0, 0.0))
        wait = min(2 * waited, MOST_SECONDS) or SECONDS
        self._waits[kind, number] = time.monotonic() + wait, wait
        with suppress(OSError):  # a full disk must not stop a step
            write_json(self._bad(kind), {"bad": [number], "why": str(error)})
        if waited:
            return
        logger.error(
            "kind %s: policy %s cannot be served and is quarantined (%s, see %s); it is tried "
            "again now and then, without more errors",
            kind,
            number,
            type(error).__name__,
            self._bad(kind),
        )
        self._directory.tell(kind, "quarantined", policy=number, why=str(error))

    def forget(self, kind: str) -> None:
        """The files of a kind are gone."""
        self._read.pop(kind, None)
        self._waits.pop((kind, self.current.pop(kind, 0)), None)
