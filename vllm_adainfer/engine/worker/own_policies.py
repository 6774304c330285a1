"""The policies that the trainer has certified: read and built on a thread, ready to be served."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.runner.build_loop import policies_of_artifacts
from vllm_adainfer.engine.scheduler.rest_of_choice import check_tokenizer
from vllm_adainfer.engine.worker.service import Built
from vllm_adainfer.errors import AdaInferError

logger = get_logger(__name__)


class OwnPolicies:
    """Reads ``current.json`` when it has changed.

    Attributes:
        served: the kinds that have a policy.
        put_away: those whose only policy cannot be served.

    """

    def __init__(self, directory: AutoDirectory, model: Any, vllm_config: VllmConfig) -> None:
        """`model` is an `EarlyExit`, whose weights are loaded."""
        self._directory, self._model, self._config = directory, model, vllm_config
        self.served: set[str] = set()
        self.put_away: set[str] = set()
        self._read: dict[str, int] = {}  # by kind, the number of the policy that was read last
        self._seen: tuple[int, int] | None = None

    def read(self) -> Built:
        """The policies that are new since the last call; one that cannot be served is put away."""
        try:
            stat = self._directory.current.stat()
        except OSError:
            return {}
        seen = stat.st_mtime_ns, stat.st_ino
        if seen == self._seen:
            return {}
        self._seen = seen
        current = read_json(self._directory.current)
        built = {}
        for kind, number in (current if isinstance(current, dict) else {}).items():
            if self._read.get(kind) == number:
                continue
            self._read[kind] = number
            try:
                built[kind] = self._build(kind, number)
                self.served.add(kind)
                self.put_away.discard(kind)
                self._directory.tell(kind, "serving", policy=number)
            except Exception as error:  # whatever is wrong with it, serving goes on
                self._put_away(kind, number, error)
        return built

    def _build(self, kind: str, number: int) -> Any:
        """The artifact of a policy, and the policy.

        Raises:
            AdaInferError: this engine cannot serve it.

        """
        model = self._model
        artifact = load_artifact(str(self._directory.policy(kind, number)))
        config, cuts = artifact.config, model.loop.policies.exit_points
        config.check_weights(model.fingerprint)
        config.check_rows_go_on(model.num_own_kv_layers)
        if not set(config.all_exit_points) <= set(cuts):
            raise AdaInferError(
                f"it has exit points {list(config.all_exit_points)}, this engine only {list(cuts)}"
            )
        if config.choices:
            tokenizer = cached_tokenizer_from_config(self._config.model_config)
            check_tokenizer(tokenizer, kind, config.choices)
        return artifact, policies_of_artifacts({kind: artifact}, model)

    def _put_away(self, kind: str, number: int, error: Exception) -> None:
        """Remember a policy that cannot be served; what was served before goes on."""
        if kind not in self.served:
            self.put_away.add(kind)
        logger.error("kind %s: policy %s cannot be served and is put away: %s", kind, number, error)
        path = self._directory.root / kind / "bad.json"
        bad = read_json(path) or {"bad": []}
        write_json(path, {"bad": sorted({*bad["bad"], number}), "why": str(error)})
        self._directory.tell(kind, "quarantined", policy=number, why=str(error))
