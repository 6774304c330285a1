"""The policies that a worker decides with, and the one way by which others come into service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any, TypeAlias

from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_adainfer.artifact.artifact import Artifact, all_parts, digest_of, digests_of
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.source import Pinned
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.runner.build_loop import monitor_of, policies_of_artifacts
from vllm_adainfer.engine.runner.ranks import RANKS_DIFFER, same_on_all_ranks
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.engine.scheduler.rest_of_answer import check_tokenizer
from vllm_adainfer.engine.startup.refusals import refuse_policy
from vllm_adainfer.engine.worker.warm_up import beside_the_steps
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.watch.watch import Watch

logger = get_logger(__name__)

STUDENT_READS = "how its student reads requests"
# By name, the artifact and the policy of each of its parts.
Built: TypeAlias = Mapping[str, tuple[Artifact, Mapping[str, Policy]]]


class ServedPolicies:
    """A worker's policies: checked and built beside the steps, and replaced between two of them."""

    def __init__(
        self,
        model: Any,
        vllm_config: VllmConfig,
        running: RunningRequests,
        prepare: Callable[[PolicySet], None] = lambda _: None,
    ) -> None:
        """`running` are the requests that the policies decide.

        `prepare` warms up policies that have been built, and raises if they cannot be served.
        """
        self.model, self.vllm_config, self._running = model, vllm_config, running
        self._prepare = prepare
        self._in_use = Lock()  # held while what is in use is read or replaced
        running.digests = digests_of(model.artifacts)

    def build(self, artifacts: Mapping[str, Artifact]) -> Built:
        """The policies of `artifacts`, ready for `replace`, or an AdaInferError."""
        for name, artifact in artifacts.items():
            self.check(name, artifact.config)
        with beside_the_steps(self.model.device):
            built = {
                name: (artifact, policies_of_artifacts({name: artifact}, self.model))
                for name, artifact in artifacts.items()
            }
            self._composed(built)  # or it fails here, not in a step
            parts = {part: policy for _, own in built.values() for part, policy in own.items()}
            if parts:
                self._prepare(PolicySet(parts))
        return built

    def build_on_all_ranks(self, read: Callable[[], Mapping[str, Artifact]]) -> Built:
        """The policies of the artifacts that `read` returns.

        A collective: every rank must call it. It succeeds only if all ranks read the same artifacts
        and could build their policies; otherwise it raises what stopped this rank, or an
        AdaInferError.
        """
        failure: Exception | None = None
        built: Built = {}
        digest = 0
        try:
            artifacts = read()
            built = self.build(artifacts)
            digest = digest_of(artifacts)
        except Exception as error:  # other ranks wait for this one below
            failure = error
        same = same_on_all_ranks(digest)
        if failure is not None:
            raise failure
        if not same:
            raise AdaInferError(RANKS_DIFFER)
        return built

    def check(self, name: str, config: ArtifactConfig) -> None:
        """Check that the running engine can serve a policy.

        Its stack stays cut where it is, and its scheduler goes on admitting requests by the
        policies of the engine switch that it started with.
        """
        model = self.model
        model.check_calibrated(config)
        config.check_rows_go_on(model.num_own_kv_layers)
        refuse_policy(name, config, self.vllm_config, model.settings)
        check_cuts(name, config, model.loop.policies.exit_points)
        if name in model.settings.artifacts:
            check_replaces(name, config, model.artifacts[name].config)
        elif config.student is not None:
            raise AdaInferError(
                f"policy {name} has a student, and only policies that the engine starts with may "
                "have one: name it in the engine switch, or calibrate without --student"
            )
        elif config.objects is not None:
            raise AdaInferError(
                f"policy {name} decides objects, and only policies that the engine starts with "
                "may: name it in the engine switch"
            )
        if config.choices:
            tokenizer = cached_tokenizer_from_config(self.vllm_config.model_config)
            check_tokenizer(tokenizer, name, config.choices)

    def replace(self, built: Built, without: Iterable[str] = ()) -> None:
        """Decide with other policies from the next step on; those that stay keep their monitors.

        Policies in `built` are added, or replaced by name; those in `without` are removed. If one
        does not certify the switch's epsilon, this is an AdaInferError, and nothing has changed.
        """
        artifacts, policies, monitors, admission = self._composed(built, without)
        with self._in_use:
            self.model.artifacts = artifacts
            self.model.loop.use_policies(policies, monitors)
        self._running.use_admission(admission)
        self._running.digests = digests_of(artifacts)

    def read_again(self, pinned: Mapping[str, Pinned] | None = None) -> Built:
        """Read the artifacts of the engine switch again. A collective: every rank must call it.

        `pinned` says by policy where its artifact lies and the digest its files must have, so that
        nothing is asked of the hub; None for whatever there is now. An AdaInferError if an artifact
        cannot be served without a restart, or ranks differ.
        """
        settings = self.model.settings

        def read() -> dict[str, Artifact]:
            if settings.artifact is None:
                raise AdaInferError("this engine has no artifact to reload")
            sources = settings.artifacts
            if pinned is not None:
                sources = {name: one.directory for name, one in pinned.items()}
            artifacts = {name: load_artifact(source) for name, source in sources.items()}
            for name, artifact in artifacts.items():
                if pinned is not None and artifact.digest != pinned[name].digest:
                    raise AdaInferError(
                        f"artifact {settings.artifacts[name]!r} was overwritten during the "
                        "reload, or replicas see different files: reload again"
                    )
            return artifacts

        return self.build_on_all_ranks(read)

    def reload(self, built: Built) -> list[str]:
        """Decide with the new policies from the next step on; a line that says so for each."""
        self.replace(built)
        sources = self.model.settings.artifacts
        lines = [f"policy {name} was reloaded from {source}" for name, source in sources.items()]
        for line in lines:
            logger.info("%s", line)
        return lines

    def _composed(
        self, built: Built, without: Iterable[str] = ()
    ) -> tuple[dict[str, Artifact], PolicySet, dict[str, Watch], Admission]:
        """What `replace` puts in use; there are no monitors without shadow requests."""
        loop, settings = self.model.loop, self.model.settings
        with self._in_use:
            artifacts, in_use, monitors = dict(self.model.artifacts), loop.policies, loop.monitors
        artifacts |= {name: artifact for name, (artifact, _) in built.items()}
        for name in without:
            del artifacts[name]
        new = {part: policy for _, parts in built.values() for part, policy in parts.items()}
        policies = dict(zip(in_use.names, in_use.policies, strict=False)) | new
        configs = {name: artifact.config for name, artifact in artifacts.items()}
        parts = all_parts(configs)
        if settings.compares:
            monitors = monitors | {n: monitor_of(parts[n], settings) for n in new}
        return (
            artifacts,
            PolicySet({part: policies[part] for part in parts}, in_use.exit_points),
            {part: monitors[part] for part in parts} if settings.compares else {},
            Admission.from_config(self.vllm_config, settings, configs),
        )


def check_cuts(name: str, config: ArtifactConfig, cuts: tuple[int, ...]) -> None:
    """Check that the stack, cut after the layers `cuts`, has the exit points of a policy."""
    if not set(config.all_exit_points) <= set(cuts):
        raise AdaInferError(
            f"policy {name} has exit points {list(config.all_exit_points)}, this engine only "
            f"{list(cuts)}: calibrate with --exit-points {','.join(map(str, cuts))}, or restart it "
            '(for policies of LoRA adapters with "exit_points": [...])'
        )


def check_replaces(name: str, new: ArtifactConfig, old: ArtifactConfig) -> None:
    """Check that the scheduler, which knows the `old` policy, admits requests of the `new`."""
    before, after = _admitted_by(old), _admitted_by(new)
    if new.student is None:  # the scheduler may go on reading texts for one that has gone
        before.pop(STUDENT_READS, None)
    for what in before | after:
        if before.get(what) != after.get(what):
            raise AdaInferError(
                f"policy {name} differs from the one before in {what}: restart the engine"
            )


def _admitted_by(config: ArtifactConfig) -> dict[str, object]:
    """All by which a scheduler admits requests to a policy, by what users call it."""
    facts: dict[str, object] = {
        "its LoRA adapter, or in the weights of that": config.adapter,
        "its choices, or in their tokens": {one.text: one.token_ids for one in config.choices},
        "its schema, its guesses, or how its objects are written": config.objects,
        "its labels": set(config.label_ids),
        "what its scores are made into": config.score_head,
        "whether it serves any of its labels (--label-pool)": config.label_pool,
        "whether it is for more than one token (--max-tokens)": config.max_tokens > 1,
        "the labels that are never early answers": set(config.never_early),
        **config.promise.admits(),
    }
    if config.student is not None:
        facts[STUDENT_READS] = config.student.reads, config.shared
    return facts
