"""The policies that the trainer has certified: read and built on a thread, ready to be served."""

from __future__ import annotations

import time
from collections.abc import Mapping

from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.auto.admitted_kind import AdmittedKind
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.worker.served_policies import Built, ServedPolicies

logger = get_logger(__name__)

SECONDS, MOST_SECONDS = 60.0, 3600.0  # until a policy is tried again, the first time and at most


class KindPolicies:
    """Reads the policies of kinds."""

    def __init__(
        self, directory: AutoDirectory, served: ServedPolicies, kinds: Mapping[str, AdmittedKind]
    ) -> None:
        """`served` builds what is read in `directory`; `kinds` have places."""
        self._directory, self._served, self._kinds = directory, served, kinds
        self._read: dict[str, int] = {}  # the numbers of the policies that were read last
        # By kind and number: until when one that failed waits, and after how many seconds.
        self._waits: dict[tuple[str, int], tuple[float, float]] = {}

    def read(self) -> Built:
        """The policies that are new since the last call.

        One that cannot be served is left out and retried later: perhaps the disk was at fault.
        """
        built: Built = {}
        for name, kind in list(self._kinds.items()):
            number = kind.certified
            if number is None or self._read.get(name) == number:
                continue
            if time.monotonic() < self._waits.get((name, number), (0.0, 0.0))[0]:
                continue
            self._read[name] = number
            try:
                artifact = load_artifact(str(self._directory.policy(name, number)))
                built = {**built, **self._served.build({name: artifact})}
            except Exception as error:  # whatever is wrong with it, serving goes on
                self.quarantine(name, error)
            else:
                kind.quarantined = {}
                self._directory.tell(name, "serving", policy=number)
        return built

    def folder(self, name: str) -> str | None:
        """Where the artifact of a kind's policy lies that was read last; None if it is gone."""
        number = self._read.get(name)
        return None if number is None else str(self._directory.policy(name, number))

    def quarantine(self, name: str, error: Exception) -> None:
        """Do not serve the new policy of a kind; its old one, if any, stays in service.

        The new one is retried later. The reason may quote client input, so it is written to the
        directory alone.
        """
        number, kind = self._read.pop(name, None), self._kinds.get(name)
        if number is None or kind is None:  # the kind has lost its place meanwhile
            return
        _, waited = self._waits.get((name, number), (0.0, 0.0))
        wait = min(2 * waited, MOST_SECONDS) or SECONDS
        self._waits[name, number] = time.monotonic() + wait, wait
        kind.quarantined = {"policy": number, "why": str(error)}
        if waited:
            return
        logger.error(
            "kind %s: policy %s cannot be served and is quarantined (%s, see %s); it is tried "
            "again now and then, without more errors",
            name,
            number,
            type(error).__name__,
            self._directory.ledger(name),
        )
        self._directory.tell(name, "quarantined", policy=number, why=str(error))

    def forget(self, name: str) -> None:
        """The files of a kind are gone."""
        self._read.pop(name, None)
        for key in list(self._waits):  # a step may quarantine another one meanwhile
            if key[0] == name:
                del self._waits[key]
