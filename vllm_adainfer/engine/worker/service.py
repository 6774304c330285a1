"""Replace the policies of a running engine: all of them, on every rank, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeAlias

from vllm.config import VllmConfig

from vllm_adainfer.artifact.artifact import Artifact, all_parts, digest_of, digests_of
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.runner.build_loop import monitor_of, policies_of_artifacts
from vllm_adainfer.engine.runner.ranks import RANKS_DIFFER, same_on_all_ranks
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.monitoring.monitor import Monitor
from vllm_adainfer.policy.load_policy import Policy
from vllm_adainfer.policy.policy_set import PolicySet

# By name, the artifact and the policy of each of its parts.
Built: TypeAlias = Mapping[str, tuple[Artifact, Mapping[str, Policy]]]
IN_USE = Lock()  # held while what is in use is read or replaced: a thread builds beside the steps


@dataclass(frozen=True)
class Service:
    """All that a worker decides with, built but not yet in use.

    Attributes:
        artifacts: the artifact of each policy, by the policy's name.
        policies: the policies, in the same order.
        monitors: the monitor of each policy, by name; empty without shadow requests.
        admission: admits requests to these policies.

    """

    artifacts: dict[str, Artifact]
    policies: PolicySet
    monitors: dict[str, Monitor]
    admission: Admission

    @classmethod
    def with_policies(
        cls, model: Any, vllm_config: VllmConfig, built: Built, without: Iterable[str] = ()
    ) -> Service:
        """The current policies with some added, replaced or removed.

        Policies that stay keep their monitors.

        Args:
            model: an `EarlyExit`.
            vllm_config: the engine's config.
            built: the policies to add, or to replace by name.
            without: the names of the policies to remove.

        Raises:
            AdaInferError: a policy does not certify the switch's epsilon.

        """
        loop, settings = model.loop, model.settings
        with IN_USE:
            artifacts, in_use, monitors_now = dict(model.artifacts), loop.policies, loop.monitors
        artifacts |= {name: artifact for name, (artifact, _) in built.items()}
        for name in without:
            del artifacts[name]
        new = {part: policy for _, parts in built.values() for part, policy in parts.items()}
        now = dict(zip(in_use.names, in_use.policies, strict=False))
        configs = {name: artifact.config for name, artifact in artifacts.items()}
        parts = all_parts(configs)
        policies = {part: new[part] if part in new else now[part] for part in parts}
        monitors = {}
        if settings.compares:
            monitors = {
                part: monitor_of(config, settings) if part in new else monitors_now[part]
                for part, config in parts.items()
            }
        admission = Admission.from_config(vllm_config, settings, configs)
        return cls(artifacts, PolicySet(policies, in_use.exit_points), monitors, admission)

    def use(self, model: Any, running: RunningRequests) -> None:
        """Decide with these policies from the next step on."""
        with IN_USE:
            model.artifacts = self.artifacts
            model.loop.use_policies(self.policies, self.monitors)
        running.use_admission(self.admission)
        running.digests = digests_of(self.artifacts)


def built_on_all_ranks(
    model: Any, vllm_config: VllmConfig, read: Callable[[], dict[str, Artifact]]
) -> Built:
    """Policies built from the artifacts that `read` returns.

    A collective: every rank must call it. It succeeds only if all ranks read the same artifacts and
    could build their policies.

    Raises:
        AdaInferError: the ranks read different artifacts, or another rank failed.
        Exception: whatever stopped this rank.

    """
    failure: Exception | None = None
    built: Built = {}
    digest = 0
    try:
        artifacts = read()
        for artifact in artifacts.values():
            artifact.config.check_rows_go_on(model.num_own_kv_layers)
        built = {
            name: (artifact, policies_of_artifacts({name: artifact}, model))
            for name, artifact in artifacts.items()
        }
        Service.with_policies(model, vllm_config, built)
        digest = digest_of(artifacts)
    except Exception as error:  # other ranks wait for this one below
        failure = error
    same = same_on_all_ranks(digest)
    if failure is not None:
        raise failure
    if not same:
        raise AdaInferError(RANKS_DIFFER)
    return built
