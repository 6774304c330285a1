"""Collect: hidden states of decision rows, read by the plugin itself at full depth."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.artifact import Label
from vllm_adainfer.calibration.data import Example
from vllm_adainfer.calibration.engine import start_engine, stop_engine
from vllm_adainfer.runtime.admission import ROW_ARG

if TYPE_CHECKING:
    from vllm import SamplingParams

CUTS_PER_PROMPT = 8


@dataclass(frozen=True)
class Recording:
    """What the full model did on the calibration prompts.

    Attributes:
        states: layer -> [rows, hidden size], the residual stream of the decision rows.
        final: [rows, hidden size], the same after the last layer (before the final norm).
        tokens: int64 [rows], what the full model answered.
        groups: int64 [rows], the prompt a row comes from. The first rows are the prompts' own
            last tokens, in order; rows after those come from prompts cut short.
        norm_weight: [hidden size] of the final norm.
        head_weight: [vocabulary, hidden size] of the LM head.
        fingerprint: of the weights.

    """

    states: dict[int, Tensor]
    final: Tensor
    tokens: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    norm_weight: Tensor
    head_weight: Tensor
    fingerprint: str


def collect(
    model: str,
    hf_config: Any,
    examples: Sequence[Example],
    labels: Sequence[Label],
    layers: Sequence[int],
    cut_prompts: int,
    seed: int,
) -> Recording:
    """Run `examples` through the model and keep the states after `layers`.

    Args:
        model: directory or hub id.
        hf_config: its config.
        examples: one decision row each.
        labels: restrict answers to these, if any.
        layers: candidate exit points.
        cut_prompts: of so many first examples also run `CUTS_PER_PROMPT` prompts cut at a random
            token, as further rows to fit a lens on.
        seed: for the cuts.

    """
    prompts = [example.token_ids for example in examples]
    groups = list(range(len(prompts)))
    generator = np.random.default_rng(seed)
    for group in range(cut_prompts):
        for length in generator.integers(1, len(prompts[group]), CUTS_PER_PROMPT, endpoint=True):
            prompts.append(prompts[group][: int(length)])
            groups.append(group)
    depth = hf_config.num_hidden_layers
    engine = start_engine(model, examples, {"record": [*layers, depth]})
    try:
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [one_token(labels, {ROW_ARG: row}) for row in range(len(prompts))],
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
        groups=np.array(groups),
        norm_weight=record["norm_weight"],
        head_weight=record["head_weight"],
        fingerprint=fingerprint,
    )


def one_token(labels: Sequence[Label], extra_args: dict[str, Any] | None = None) -> SamplingParams:
    """Greedy parameters for one token, restricted to `labels` if there are any."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=1,
        allowed_token_ids=[label.token_id for label in labels] or None,
        extra_args=extra_args,
    )
