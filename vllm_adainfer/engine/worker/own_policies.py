"""The policies that the trainer has certified: read and built on a thread, ready to be served."""

from __future__ import annotations

import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.runner.build_loop import policies_of_artifacts
from vllm_adainfer.engine.scheduler.rest_of_choice import check_tokenizer
from vllm_adainfer.engine.worker.service import Built, Service
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.load_policy import Policy

logger = get_logger(__name__)

SECONDS, MOST_SECONDS = 60.0, 3600.0  # until a policy is tried again, the first time and at most


class OwnPolicies:
    """Reads ``current.json`` when it has changed.

    Attributes:
        current: by kind, the number of its policy, if that is there.

    """

    def __init__(self, directory: AutoDirectory, model: Any, vllm_config: VllmConfig) -> None:
        """`model` is an `EarlyExit`, whose weights are loaded."""
        self._directory, self._model, self._config = directory, model, vllm_config
        self._read: dict[str, int] = {}  # the numbers of the policies that were read last
        # By kind and number: until when one that failed waits, and after how many seconds.
        self._waits: dict[tuple[str, int], tuple[float, float]] = {}
        self._seen: tuple[int, int] | None = None
        self.current: dict[str, int] = {}
        self._look()

    def read(self, kinds: Container[str]) -> Built:
        """The policies of `kinds` that are new since the last call.

        One that cannot be served stays out, and is tried again later: perhaps the disk was at
        fault.
        """
        self._look()
        built = {}
        for kind, number in self.current.items():
            if kind not in kinds or self._read.get(kind) == number or self._waits_on(kind, number):
                continue
            self._read[kind] = number
            try:
                built[kind] = self._build(kind, number)
            except Exception as error:  # whatever is wrong with it, serving goes on
                self.quarantine(kind, error)
            else:
                self._served(kind, number)
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

    def _build(self, kind: str, number: int) -> tuple[Artifact, dict[str, Policy]]:
        """The artifact of a policy, and the policy.

        Raises:
            AdaInferError: this engine cannot serve it.

        """
        model = self._model
        artifact = load_artifact(str(self._directory.policy(kind, number)))
        config, cuts = artifact.config, model.loop.policies.exit_points
        model.check_calibrated(config)
        config.check_rows_go_on(model.num_own_kv_layers)
        if not set(config.all_exit_points) <= set(cuts):
            raise AdaInferError(
                f"it has exit points {list(config.all_exit_points)}, this engine only {list(cuts)}"
            )
        if config.choices:
            tokenizer = cached_tokenizer_from_config(self._config.model_config)
            check_tokenizer(tokenizer, kind, config.choices)
        found = artifact, policies_of_artifacts({kind: artifact}, model)
        Service.with_policies(model, self._config, {kind: found})  # or it fails here, not in a step
        return found

    def _waits_on(self, kind: str, number: int) -> bool:
        """Whether a policy that could not be served is not to be tried again yet."""
        return time.monotonic() < self._waits.get((kind, number), (0.0, 0.0))[0]

    def _served(self, kind: str, number: int) -> None:
        with suppress(OSError):
            self._bad(kind).unlink(missing_ok=True)
        self._directory.tell(kind, "serving", policy=number)

    def _bad(self, kind: str) -> Path:
        return self._directory.root / kind / "bad.json"

    def quarantine(self, kind: str, error: Exception) -> None:
        """Serve no policy of a kind that is new; what was served before goes on.

        It is tried again later. The reason may quote what clients sent, so it is written to the
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
