"""Collect: what probes are fitted on, recorded by the plugin itself at full depth."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.artifact import Label
from vllm_adainfer.calibration.data import Example
from vllm_adainfer.calibration.engine import start_engine, stop_engine
from vllm_adainfer.decision.moments import Moments
from vllm_adainfer.runtime.admission import ROW_ARG

if TYPE_CHECKING:
    from vllm import SamplingParams

FOLDS = 5  # prompt i of the recording is in fold i % FOLDS


@dataclass(frozen=True)
class Recording:
    """What the full model did on the calibration prompts.

    Attributes:
        states: layer -> [rows, hidden size], the residual stream of the decision rows: the
            prompts' own last tokens, in order.
        final: [rows, hidden size], the same after the last layer (before the final norm).
        tokens: int64 [rows], what the full model answered.
        moments: layer -> folds of the prompts that a lens may learn from, summed over their rows
            (all sorts of rows, see `LensSums`), with the change until the last layer as target.
        norm_weight: [hidden size] of the final norm.
        head_weight: [vocabulary, hidden size] of the LM head.
        fingerprint: of the weights.

    """

    states: dict[int, Tensor]
    final: Tensor
    tokens: npt.NDArray[np.int64]
    moments: dict[int, list[Moments]]
    norm_weight: Tensor
    head_weight: Tensor
    fingerprint: str


def collect(
    model: str,
    hf_config: Any,
    examples: Sequence[Example],
    labels: Sequence[Label],
    layers: Sequence[int],
    lens_prompts: int,
) -> Recording:
    """Run `examples` through the model and keep the states after `layers`.

    Args:
        model: directory or hub id.
        hf_config: its config.
        examples: one decision row each.
        labels: restrict answers to these, if any.
        layers: candidate exit points.
        lens_prompts: sum the rows of so many first examples for a lens. What the prefix cache
            has of a prompt is not computed again, so a shared prefix is summed once.

    """
    depth = hf_config.num_hidden_layers
    switch: dict[str, Any] = {"record": [*layers, depth]}
    if lens_prompts:
        switch["record_lens"] = {"folds": FOLDS, "prompts": lens_prompts}
    engine = start_engine(model, examples, switch)
    try:
        outputs = engine.generate(
            [{"prompt_token_ids": example.token_ids} for example in examples],
            [one_token(labels, {ROW_ARG: row}) for row in range(len(examples))],
            use_tqdm=sys.stderr.isatty(),  # vLLM 0.32 divides by zero where TQDM_DISABLE is set
        )
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "record.safetensors"
            [fingerprint] = engine.collective_rpc("adainfer_take_record", args=(str(path),))
            record = load_file(path)
    finally:
        stop_engine(engine)
    return Recording(
        states={layer: record[f"layer.{layer}"] for layer in layers},
        final=record[f"layer.{depth}"],
        tokens=np.array([output.outputs[0].token_ids[0] for output in outputs]),
        moments={layer: _folds(record, layer) for layer in layers} if lens_prompts else {},
        norm_weight=record["norm_weight"],
        head_weight=record["head_weight"],
        fingerprint=fingerprint,
    )


def _folds(record: dict[str, Tensor], layer: int) -> list[Moments]:
    """The moments of one layer, as `LensSums.take` named their parts."""
    names = [field.name for field in fields(Moments)]
    return [
        Moments(**{name: record[f"lens.{layer}.{fold}.{name}"] for name in names})
        for fold in range(FOLDS)
    ]


def one_token(labels: Sequence[Label], extra_args: dict[str, Any] | None = None) -> SamplingParams:
    """Greedy parameters for one token, restricted to `labels` if there are any."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=1,
        allowed_token_ids=[label.token_id for label in labels] or None,
        extra_args=extra_args,
    )
