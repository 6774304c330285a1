"""A policy from the rows of a kind, made as `vllm-adainfer calibrate` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from adainfer_kernels import Head
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.artifact.outputs import AnyOutput, Labels
from vllm_adainfer.artifact.tensors import UNREADABLE
from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.choices import find_choices
from vllm_adainfer.offline.calibration.data.label_pool import labels_of
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, fit_policy
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import Rows, ServedModel, by_layer
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.policy.probe import Probe


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
        if not kind.choices:
            return Labels(labels=labels_of(kind.labels, self.tokenizer))
        return find_choices(kind.choices, self.tokenizer, self.hf_config.vocab_size)


def policy_of(
    served: Served,
    kind: Kind,
    recorded: Mapping[str, Tensor],
    held_out: int,
    epsilon: float,
    delta: float,
) -> FittedPolicy:
    """Fit on the older of the `recorded` rows, and certify on the `held_out` newest.

    They were answered by the tokens that a request of this kind allows.

    An AdaInferError if no first token decides a choice of the kind.
    """
    output = served.output(kind)
    answers = torch.tensor([label.token_id for label in output.labels])
    first_tokens = FirstTokens.of(output)
    allowed = answers if first_tokens is None else first_tokens.token_ids
    model, final = served.model, recorded["final"]
    plain = model.as_served(model.logit_lens.of_tokens(allowed))
    tokens = plain.score(plain.readout(final)).top1_id.numpy()
    rows = Rows(
        model=model,
        states=by_layer(recorded),
        final=final,
        tokens=tokens if first_tokens is None else answers.numpy()[first_tokens.labels_of(tokens)],
        prompts=np.arange(len(final)),
        computed=recorded["computed"].double().numpy(),
    )
    calibration = Calibration(
        rows,
        Target("label-head", answers, first_tokens=first_tokens),
        Split.of_groups(rows.prompts, held_out),
        PolicyOptions(epsilon=epsilon, delta=delta),
        output,
    )
    return fit_policy(calibration, "label-head")
