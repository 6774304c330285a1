"""The mixin of our workers, and the methods that ``collective_rpc`` calls."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from typing_extensions import override
from vllm.distributed import get_tp_group

from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.source import Pinned
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.lora import lora_manager_of
from vllm_adainfer.engine.compat.processes import end_with_starter
from vllm_adainfer.engine.compat.runner import attach_note, before_answers_leave
from vllm_adainfer.engine.compat.scheduler import written_objects
from vllm_adainfer.engine.runner.ranks import made_by_rank0
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.engine.runner.v2_drafts import verify_drafts
from vllm_adainfer.engine.worker.adapter_policy import bundled_policy
from vllm_adainfer.engine.worker.model_facts import facts_of
from vllm_adainfer.engine.worker.self_calibration import SelfCalibration
from vllm_adainfer.engine.worker.served_policies import Built, ServedPolicies
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.accounting.clock import StepTimes
from vllm_adainfer.exits.recording.recorder import served_recorder
from vllm_adainfer.policy.policy_set import PolicySet

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object

logger = get_logger(__name__)


class ExitWorker(_Worker):
    """Mixin for vLLM's workers. Must precede the vLLM class in the MRO."""

    _self_calibration: SelfCalibration | None = None

    @property
    def _running(self) -> RunningRequests:
        runner: Any = self.model_runner
        running: RunningRequests = (
            runner.model_state.running if self.use_v2_model_runner else runner.running
        )
        return running

    @override
    def init_device(self) -> None:
        """Drop the request check first: only the frontend runs it; end with what started this."""
        end_with_starter()
        self.model_config.logits_processors = None
        super().init_device()

    @override
    def load_model(self, **kwargs: Any) -> None:
        """Give the running requests the LoRA manager once the model is loaded."""
        super().load_model(**kwargs)
        if self.use_v2_model_runner:
            verify_drafts(self.model_runner)
        self._reloads: dict[str, Built] = {}
        model = self.model_runner.model
        self._served = ServedPolicies(model, self.vllm_config, self._running, self.prepare_policies)
        if model.settings.calibrates_itself:
            self._calibrate_itself(model)
        manager = lora_manager_of(self.model_runner)
        self._running.lora_manager = manager
        if manager is not None:
            self._running.adapters.watch(manager)

    def _calibrate_itself(self, model: Any) -> None:
        """Begin to record, train and keep ledgers: on the first rank, which the others follow."""
        head, model.loop.keep_states = model.whole_head(), lambda *_: None
        if head is None:
            return
        own = SelfCalibration(model.settings.auto, self._served, head)
        self._self_calibration, self._running.kinds = own, own.kinds
        model.loop.keep_states = served_recorder(model.loop.policies.exit_points, own.put)
        model.loop.times = StepTimes(model.device)

    def prepare_policies(self, policies: PolicySet) -> None:
        """Get ready for `policies`, which come after the start; on a CPU there is nothing to do."""

    @override
    def compile_or_warm_up_model(self) -> Any:
        """Then clients' requests come."""
        times = super().compile_or_warm_up_model()
        if self._self_calibration is not None:
            self._self_calibration.serving_begins()
        return times

    @override
    def shutdown(self) -> None:
        """End what runs beside the steps."""
        if self._self_calibration is not None:
            self._self_calibration.close()
        super().shutdown()

    @override
    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Deactivate policies until `load_weights` has seen all weights again.

        It does not see weights that vLLM writes in a kernel's own format.
        """
        self.model_runner.model.mark_all_weights_replaced()
        super().reload_weights(*args, **kwargs)

    @override
    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load the adapter with its bundled policy, or neither if the policy cannot be served."""
        model, adapters = self.model_runner.model, self._running.adapters
        built = bundled_policy(self._served, lora_request)
        try:
            added: bool = super().add_lora(lora_request)
        finally:  # a collective: the other ranks wait in it
            same = adapters.agree(lora_request)
        name = lora_request.lora_name
        if not same:
            raise AdaInferError(
                f"ranks have loaded different files as the adapter {name}: load it again"
            )
        if built:
            self._served.replace(built)
        if name in model.artifacts and name not in model.settings.artifacts:
            adapters.numbers[name] = lora_request.lora_int_id
        return added

    @override
    def remove_lora(self, lora_id: int) -> bool:
        """Drop the policy that was bundled with the adapter."""
        removed: bool = super().remove_lora(lora_id)
        self.adainfer_drop_policy(lora_id)
        return removed

    @override
    def execute_model(self, scheduler_output: Any) -> Any:
        """Report also after an empty step, which vLLM sends when the last requests have ended.

        A classifier's step ends here, too: nothing is sampled.
        """
        self._running.ended(scheduler_output.finished_req_ids, written_objects(scheduler_output))
        if self.model_runner.model.settings.calibrates_itself:
            self._serve_certified()
        output = super().execute_model(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0 and output is not None:
            output = copy.copy(output)  # vLLM returns one shared object for all empty steps
            attach_note(output, self._running.idle_note())
        elif output is not None:
            self._attach_note(output)
        return output

    @override
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Attach a note: which KV is complete, and the counters."""
        output = super().sample_tokens(grammar_output)
        self._attach_note(output)
        return output

    def _serve_certified(self) -> None:
        """Decide with policies that this server has calibrated, from this step on.

        In nearly all steps there is nothing new, and no kind has lost its place.
        """
        own, served = self._self_calibration, self._served
        lost = own.kinds.take_lost() if own else []
        built: Built = own.take_built() if own else {}

        def news() -> tuple[list[str], dict[str, str]]:
            assert own is not None
            return [one.name for one in lost], own.folders_of(built)

        gone, folders = made_by_rank0(news)
        if gone:
            served.replace({}, without=[name for name in gone if name in served.model.artifacts])
        if own and lost:
            own.forget(lost)
        if not folders:
            return
        try:
            if get_tp_group().world_size > 1:
                built = served.build_on_all_ranks(
                    lambda: {name: load_artifact(folder) for name, folder in folders.items()}
                )
            served.replace({name: built[name] for name in folders})
        except Exception as error:  # whatever is wrong with it, serving goes on
            if own:
                own.quarantine(folders, error)
        else:
            if own:
                own.kinds.came_into_service(folders)

    def _attach_note(self, output: Any) -> None:
        note = self._running.take_note()
        if note is not None:
            attach_note(output, note)
        if (step := self._running.unjudged_step()) is not None:
            before_answers_leave(output, partial(self._running.judge, step))

    def adainfer_drop_policy(self, lora_id: int) -> None:
        """Drop the policy bundled with an adapter: its requests continue at full depth."""
        numbers = self._running.adapters.numbers
        if gone := [name for name, number in numbers.items() if number == lora_id]:
            self._served.replace({}, without=gone)
            for name in gone:
                logger.info("AdaInfer dropped policy %s together with its adapter", name)
                del numbers[name]

    def adainfer_stats(self) -> dict[str, Any]:
        """This worker's counters; see `vllm_adainfer.stats`."""
        stats: dict[str, Any] = self.model_runner.model.loop.stats.as_dict()
        return stats

    def adainfer_reload(self) -> list[str]:
        """Reload the artifacts and serve with them; see `ServedPolicies`."""
        return self._served.reload(self._served.read_again())

    def adainfer_read_again(self, reload: str, pinned: Mapping[str, Sequence[str]]) -> None:
        """Phase 1 of a reload across engines: read and build, without using the result.

        `reload` names it for phase 2. `pinned` has, by policy, the directory of its artifact and
        the digest of its files: all engines must read the same.
        """
        found = {name: Pinned(*one) for name, one in pinned.items()}  # a list after the transfer
        self._reloads[reload] = self._served.read_again(found)

    def adainfer_end_reload(self, reload: str, use: bool) -> list[str]:
        """Phase 2: serve with the result of phase 1, or drop it."""
        built = self._reloads.pop(reload, None)
        return self._served.reload(built) if use and built is not None else []

    def adainfer_take_record(self, directory: str) -> dict[str, Any]:
        """Add what was recorded to the files of `directory`: rows, sums, and the model.

        Returns `facts_of` the served model, ``threads`` that computed, ``states`` (layer -> the
        file of the states of whole prompts after it), and the times of `Timings`.
        """
        model: Any = self.model_runner.model
        recorder = model.loop.recorder
        rows, sums = recorder.take()
        number = len([*Path(directory).glob("[0-9]*.safetensors")]) + 1
        save_file(rows, f"{directory}/{number:06}.safetensors")
        save_file(sums, f"{directory}/sums.safetensors")
        lens = model.logit_lens()
        head = {name: part.clone() for name, part in lens.model_tensors.items()}
        save_file(head, f"{directory}/head.safetensors")
        return {
            **facts_of(model),
            "states": {} if recorder.files is None else recorder.files.by_layer,
            "norm": lens.norm and (lens.norm.kind, lens.norm.eps),
            "threads": torch.get_num_threads(),
            **model.loop.timings.as_dict(),
        }
