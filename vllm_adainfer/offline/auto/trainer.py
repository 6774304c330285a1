"""The trainer: looks for rows, tries to certify policies from them, and hands these over.

A try is written down before it begins. A trainer that is killed at any moment leaves files from
which the next one goes on: it makes the same try again, from the same rows.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from adainfer_kernels import Head
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.artifact.fields import Adapter
from vllm_adainfer.artifact.kinds import ProbeKind
from vllm_adainfer.artifact.outputs import AnyOutput, LabelPool, Labels, Scores
from vllm_adainfer.artifact.tensors import UNREADABLE
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.kinds import PROBABILITIES, Kind
from vllm_adainfer.auto.tries import CERTIFIED, GIVEN_UP, MORE, RECORDING, TRIES, State, Try
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.recording.recorder import MEAN
from vllm_adainfer.files import PRIVATE, whole_directory
from vllm_adainfer.offline.calibration.data.choices import find_choices
from vllm_adainfer.offline.calibration.data.label_pool import labels_of
from vllm_adainfer.offline.calibration.data.score_labels import score_head_of, score_labels
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.probes import Target, full_depth_labels
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, fit_policy
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import (
    Rows,
    ServedModel,
    Shard,
    by_layer,
    load_shards,
    of_one_input,
    only_finite,
    read_shards,
)
from vllm_adainfer.offline.calibration.write.policy_artifact import write_artifact
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import say
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.label_subsets import mask_of, restrict
from vllm_adainfer.promise.tolerance import Tolerance

MOST_BEGINNINGS = 3  # a try that ends so many trainers, perhaps for want of memory, has failed
WORTH = 0.05  # a policy that saves a smaller share of the layers changes answers for nothing
SECONDS, MOST_SECONDS = 2.0, 600.0  # between two looks, and after several that failed


@dataclass(frozen=True)
class Served:
    """The served model.

    Attributes:
        facts: what its worker wrote to ``model.json``.
        model: the model that these describe; its head maps the file.
        hf_config: the Hugging Face config.
        tokenizer: the Hugging Face tokenizer.

    """

    facts: Mapping[str, Any]
    model: ServedModel
    hf_config: Any
    tokenizer: Any

    @classmethod
    def read(cls, directory: AutoDirectory) -> Served:
        """The model that the worker has described.

        An AdaInferError if it has not, or the description or the model cannot be read.
        """
        facts = read_json(directory.model)
        try:
            lens = Probe(Head(load_file(directory.head)["head_weight"]))
            # Beside a busy server one thread; probes of a few labels do not gain by more.
            model = ServedModel.of_facts({**facts, "threads": 1}, lens)
            name, overrides = facts["model"], facts["hf_overrides"]
        except (*UNREADABLE, KeyError, TypeError) as error:
            raise AdaInferError(
                f"{directory.model} and {directory.head.name} do not describe a model ({error}): "
                "start the server again, which writes them"
            ) from None
        return cls(facts, model, *load_config_and_tokenizer(name, overrides))

    def output(self, kind: Kind) -> AnyOutput:
        """What requests of a kind ask for.

        An AdaInferError if no first token decides a choice.
        """
        if (head := score_head_of(self.hf_config)) is not None:
            names = tuple(label.name for label in score_labels(self.hf_config))
            return Scores(score_head=head, classes=names)
        if kind.is_pool:
            return LabelPool(labels=labels_of(kind.labels, self.tokenizer))
        if not kind.choices:
            return Labels(labels=labels_of(kind.labels, self.tokenizer))
        return find_choices(kind.choices, self.tokenizer, self.hf_config.vocab_size)


class Trainer:
    """Looks after the kinds in a directory."""

    def __init__(self, directory: AutoDirectory, tries: Sequence[int] = TRIES) -> None:
        """Begin at `tries` rows; what a killed trainer left half-written is deleted."""
        self.directory, self.tries = directory, tries
        self._begun: set[tuple[str, int]] = set()  # by this trainer
        self._waits: dict[str, tuple[float, float]] = {}  # until when, after how many seconds
        self._model: tuple[Mapping[str, Any], Served] | None = None
        root = directory.root
        for folder in root.glob("*/.policy-*"):
            shutil.rmtree(folder, ignore_errors=True)
        for file in root.glob("*/.trainer.json.*"):
            file.unlink(missing_ok=True)

    def look(self) -> None:
        """Look at each kind once. One whose files cannot be read or written is left for later."""
        facts, described = read_json(self.directory.model), read_json(self.directory.kinds)
        if not isinstance(facts, dict) or not isinstance(described, dict):
            return  # the server has not said yet
        for name, content in described.get("kinds", {}).items():
            until, waited = self._waits.get(name, (0.0, SECONDS))
            if time.monotonic() < until:
                continue
            try:
                self._look_at(name, Kind.of_dict(content["kind"]), facts)
                self._waits.pop(name, None)
            except (*UNREADABLE, LookupError, TypeError, ValueError) as error:
                wait = min(2 * waited, MOST_SECONDS)
                self._waits[name] = time.monotonic() + wait, wait
                say(f"{name}: {type(error).__name__}: {error}; once more in {wait:.0f} seconds")

    def _look_at(self, name: str, kind: Kind, facts: Mapping[str, Any]) -> None:
        """Make or repeat a try, if the kind has rows enough for it."""
        state = State.of(read_json(self.directory.trainer(name)))
        noted = read_json(self.directory.ledger(name)) or {}
        course, fingerprint = int(noted.get("course", 0)), facts["fingerprint"]
        all_tries = [one for one in state.tries if one.fingerprint == fingerprint]
        tries = [one for one in all_tries if one.course == course]
        if state.status != RECORDING and tries:
            self._delete_rows(name)
            return
        shards = read_shards(self.directory.rows(name))
        if not tries or tries[-1].outcome is not None:
            rows = sum(shard.rows for shard in shards)
            if len(tries) == len(self.tries) or rows < self.tries[len(tries)]:
                return
            number = 1 + max((one.number for one in state.tries), default=0)
            tries.append(Try(number, fingerprint, rows, shards[-1].number, course=course))
            all_tries.append(tries[-1])
        latest, last = tries[-1], len(tries) == len(self.tries)
        state = state.with_latest(latest)
        if (name, latest.number) not in self._begun:
            if latest.begun == MOST_BEGINNINGS:
                why = f"{latest.begun} trainers have ended while they fitted a policy"
                self._end(name, state, why, last)
                return
            state = state.with_latest(replace(latest, begun=latest.begun + 1))
            write_json(self.directory.trainer(name), asdict(state))
            self._begun.add((name, latest.number))
        shards = [one for one in shards if one.number <= latest.newest]
        if not shards:  # too old, or deleted by hand
            self._end(name, state, "its rows were deleted before it ended", last)
            return
        # Rows that were there at the try before certify nothing, and shares of delta of all tries
        # add up to less than 1.
        since = tries[-2].newest if len(tries) > 1 else -1
        share = 1 / (len(all_tries) * (len(all_tries) + 1))
        self._try(name, kind, state, shards, since, share, noted, last)

    def _try(
        self,
        name: str,
        kind: Kind,
        state: State,
        shards: Sequence[Shard],
        since: int,
        share: float,
        noted: Mapping[str, Any],
        last: bool,
    ) -> None:
        """Fit on older rows of `shards` and certify on those after `since`; end the latest try.

        `noted` is the file of the kind's ledger.
        """
        served = self._served()
        rows, is_whole = of_one_input(load_shards(shards))
        rows = only_finite(rows)
        held_out = int((rows["shards"] > since).sum()) // 2
        options = PolicyOptions(
            epsilon=served.facts["epsilon"], delta=served.facts["delta"] * share
        )
        if kind.reads in PROBABILITIES:
            options = replace(options, promise=Tolerance.asked(served.facts["tolerance"]))
        epsilon = options.epsilon
        try:
            output = served.output(kind)
        except AdaInferError as error:  # no number of rows would help
            self._end(name, state, str(error), last=True)
            return
        try:
            whole_from = noted.get("pooled_from") if is_whole else None
            policy = policy_of(served, output, rows, held_out, options, whole_from)
        except (ArithmeticError, RuntimeError, ValueError) as error:  # AdaInferError is one
            self._end(name, state, str(error), last)
            return
        saved = policy.points[epsilon].layers_saved if epsilon in policy.points else 0.0
        if saved < WORTH:
            why = (
                f"within {epsilon:.1%} changed answers, {held_out} held-out rows allow a policy to "
                f"save {saved:.1%} of the layers, which is less than {WORTH:.0%}"
            )
            self._end(name, state, why, last)
            return
        before = state.best(state.course)
        if before is not None and saved < before.layers_saved + MORE:
            why = (
                f"a policy of {len(rows['final'])} rows saves {saved:.1%} of the layers, not "
                f"{MORE:.0%} more than policy {before.number}, which serves on"
            )
            self._end(name, state, why, last)
            return
        target = self.directory.policy(name, state.tries[-1].number)
        with whole_directory(target, 0o700) as draft:  # which only this user may read
            model, adapter = served.facts["model"], None
            if kind.adapter is not None:
                adapter = Adapter(name=kind.adapter, fingerprint=noted["weights"])
            config = write_artifact(policy, model, served.hf_config, None, draft, adapter)
            for file in draft.iterdir():
                file.chmod(PRIVATE)
        [level] = [one for one in config.levels if one.epsilon == epsilon]
        facts = {"layers_saved": level.layers_saved, "bound": level.bound}
        self._end(name, state, CERTIFIED, last, **facts)

    def _served(self) -> Served:
        """The served model, read once unless it changes."""
        facts = read_json(self.directory.model)
        if self._model is None or self._model[0] != facts:
            self._model = facts, Served.read(self.directory)
        return self._model[1]

    def _end(self, name: str, state: State, outcome: str, last: bool, **facts: float) -> None:
        """Write down how the latest try ended, and delete rows that no other one will need."""
        saved = facts.get("layers_saved", 0.0)
        latest, state = state.tries[-1], state.ended(outcome, last, saved)
        write_json(self.directory.trainer(name), asdict(state))
        if state.status != RECORDING:
            self._delete_rows(name)
        number, rows = latest.number, latest.rows
        if outcome == CERTIFIED:
            self.directory.tell(name, CERTIFIED, number=number, rows=rows, **facts)
            return
        self.directory.tell(name, "tried", number=number, rows=rows, why=outcome)
        if state.status == GIVEN_UP:
            self.directory.tell(name, GIVEN_UP, rows=rows)

    def _delete_rows(self, name: str) -> None:
        """Delete the states of a kind, which count as prompts."""
        shutil.rmtree(self.directory.rows(name), ignore_errors=True)


def policy_of(
    served: Served,
    output: AnyOutput,
    recorded: Mapping[str, Tensor],
    held_out: int,
    options: PolicyOptions,
    pooled_from: int | None = None,
) -> FittedPolicy:
    """Fit on the older of the `recorded` rows, and certify on the `held_out` newest.

    They were answered by the tokens that `output`, which the requests ask for, allows. With
    `pooled_from`, rows have the means over the prompts from there on.
    """
    answers = torch.tensor([label.token_id for label in output.labels])
    first_tokens = FirstTokens.of(output)
    allowed = answers if first_tokens is None else first_tokens.token_ids
    model, final = served.model, recorded["final"]
    plain = model.as_served(model.logit_lens.of_tokens(allowed))
    subsets = None
    if isinstance(output, LabelPool):
        subsets = mask_of(recorded["subset"], torch.arange(len(answers)))
    scores = plain.score(plain.readout(final), return_scores=True).scores
    assert scores is not None
    tokens = allowed[restrict(scores, subsets).argmax(1)].numpy()
    rows = Rows(
        model=model,
        states=by_layer(recorded),
        final=final,
        tokens=tokens if first_tokens is None else answers.numpy()[first_tokens.labels_of(tokens)],
        prompts=np.arange(len(final)),
        computed=recorded["computed"].double().numpy(),
        means={layer: mean.float() for layer, mean in by_layer(recorded, MEAN).items()},
    )
    probe: ProbeKind = "label-head" if pooled_from is None else "pooled-label-head"
    names = [label.name for label in output.labels]
    promise, full_depth = options.promise.about(names, output.link), None
    if promise.reads_probabilities:
        full_depth = full_depth_labels(rows, answers, subsets, promise.link)
    calibration = Calibration(
        rows,
        Target(probe, answers, full_depth, subsets, first_tokens, promise),
        Split.of_groups(rows.prompts, held_out),
        options,
        output,
        pooled_from=pooled_from,
    )
    return fit_policy(calibration, probe if pooled_from is None else "auto")
