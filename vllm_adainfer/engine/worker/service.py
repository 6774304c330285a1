"""What a running engine decides by changes as a whole, on every rank, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vllm.config import VllmConfig

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.artifact.digest import digest_of
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.runner.build_loop import monitor_of
from vllm_adainfer.engine.runner.ranks import RANKS_DIFFER, same_on_all_ranks
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.monitoring.monitor import Monitor
from vllm_adainfer.policy.load_policy import Policy, policy_of
from vllm_adainfer.policy.policy_set import PolicySet

Built: TypeAlias = Mapping[str, tuple[Artifact, Policy]]


@dataclass(frozen=True)
class Service:
    """All that a worker decides by, built and not yet in use.

    Attributes:
        artifacts: by the name of their policy.
        policies: in the same order.
        monitors: in the same order, or none.
        admission: of requests to these policies.

    """

    artifacts: dict[str, Artifact]
    policies: PolicySet
    monitors: dict[str, Monitor]
    admission: Admission

    @classmethod
    def having(
        cls, model: Any, vllm_config: VllmConfig, built: Built, without: Iterable[str] = ()
    ) -> Service:
        """What serves now, with policies more, or in the place of their names, or fewer.

        Those that stay keep what their monitors have seen.

        Args:
            model: an `EarlyExit`.
            vllm_config: of the engine.
            built: of the policies that come, by name.
            without: names of policies that go.

        Raises:
            AdaInferError: a policy does not certify the switch's epsilon.

        """
        loop, settings = model.loop, model.settings
        now = zip(loop.policies.names, loop.policies.policies, strict=False)
        policies = {**dict(now), **{name: policy for name, (_, policy) in built.items()}}
        artifacts = {**model.artifacts, **{name: artifact for name, (artifact, _) in built.items()}}
        for name in without:
            del policies[name], artifacts[name]
        monitors = {}
        if settings.shadow_rate:
            monitors = {
                name: monitor_of(artifact.config) if name in built else loop.monitors[name]
                for name, artifact in artifacts.items()
            }
        configs = {name: artifact.config for name, artifact in artifacts.items()}
        admission = Admission.from_config(vllm_config, settings, configs)
        cuts = loop.policies.exit_points
        return cls(artifacts, PolicySet(policies, cuts), monitors, admission)

    def use(self, model: Any, running: RunningRequests) -> None:
        """Decide by it from the next step on."""
        model.artifacts = self.artifacts
        model.loop.use_policies(self.policies, self.monitors)
        running.use_admission(self.admission)


def built_on_all_ranks(
    model: Any, vllm_config: VllmConfig, read: Callable[[], dict[str, Artifact]]
) -> Built:
    """The policies of the artifacts that `read` returns, which can be served beside the others.

    All ranks must call this: they go on if every one of them has read the same, and built it.

    Raises:
        AdaInferError: they have not.
        Exception: whatever stopped this rank.

    """
    failure: Exception | None = None
    built: Built = {}
    digest = 0
    try:
        artifacts = read()
        built = {
            name: (artifact, policy_of(artifact, model.device, model.logit_lens))
            for name, artifact in artifacts.items()
        }
        Service.having(model, vllm_config, built)
        digest = digest_of(artifacts)
    except Exception as error:  # other ranks wait for this one below
        failure = error
    same = same_on_all_ranks(digest)
    if failure is not None:
        raise failure
    if not same:
        raise AdaInferError(RANKS_DIFFER)
    return built
