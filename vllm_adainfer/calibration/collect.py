"""Collect: what probes are fitted on, recorded by the plugin itself at full depth."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from vllm_adainfer.decision.bound import FloatArray
from vllm_adainfer.decision.moments import Moments
from vllm_adainfer.runtime.admission import ROW_ARG

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

Ints = npt.NDArray[np.int64]

FOLDS = 5  # prompt i of the recording is in fold i % FOLDS


@dataclass(frozen=True)
class Recording:
    """What the full model did on the calibration prompts.

    Attributes:
        states: layer -> [rows, hidden size], the residual stream of the decision rows: the
            prompts' own last tokens, in order.
        depth: layers of the model.
        final: [rows, hidden size], the same after the last layer (before the final norm).
        tokens: int64 [rows], what the full model answered.
        computed: [rows], token rows of each prompt that were computed, not taken from the cache.
        moments: layer -> folds of the prompts that a lens may learn from, summed over their rows
            (all sorts of rows, see `LensSums`), with the change until the last layer as target.
        norm_weight: [hidden size] of the final norm.
        head_weight: [vocabulary, hidden size] of the LM head.
        fingerprint: of the weights.
        layer_seconds: one layer for one token row.
        cut_seconds: cutting the batch, for one token row of it.
        threads: that the model was computed with.

    """

    states: dict[int, Tensor]
    depth: int
    final: Tensor
    tokens: Ints
    computed: FloatArray
    moments: dict[int, list[Moments]]
    norm_weight: Tensor
    head_weight: Tensor
    fingerprint: str
    layer_seconds: float
    cut_seconds: float
    threads: int


@contextmanager
def recording_engine(
    model: str,
    hf_config: Any,
    examples: Sequence[Example],
    layers: Sequence[int],
    lens_prompts: int = 0,
) -> Iterator[LLM]:
    """An engine that keeps the states after `layers`, for `record`.

    Args:
        model: directory or hub id.
        hf_config: its config.
        examples: the longest one to come decides the engine's maximum length.
        layers: candidate exit points.
        lens_prompts: sum the rows of so many first prompts of a recording for a lens. What the
            prefix cache has of a prompt is not computed again, so a shared prefix is summed once.

    """
    switch: dict[str, Any] = {"record": [*layers, hf_config.num_hidden_layers]}
    if lens_prompts:
        switch["record_lens"] = {"folds": FOLDS, "prompts": lens_prompts}
    engine = start_engine(model, examples, switch)
    try:
        yield engine
    finally:
        stop_engine(engine)


def record(
    engine: LLM, examples: Sequence[Example], labels: Sequence[Label], layers: Sequence[int]
) -> Recording:
    """Run `examples`, one decision row each, through an engine of `recording_engine`.

    `labels` restrict the answers, if there are any; `layers` are the engine's.
    """
    engine.reset_prefix_cache()
    outputs = engine.generate(
        [{"prompt_token_ids": example.token_ids} for example in examples],
        [one_token(labels, {ROW_ARG: row}) for row in range(len(examples))],
        use_tqdm=sys.stderr.isatty(),  # vLLM 0.32 divides by zero where TQDM_DISABLE is set
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "record.safetensors"
        [facts] = engine.collective_rpc("adainfer_take_record", args=(str(path),))
        tensors = load_file(path)
    depth = max(int(name.removeprefix("layer.")) for name in tensors if name.startswith("layer."))
    has_lens = any(name.startswith("lens.") for name in tensors)
    return Recording(
        states={layer: tensors[f"layer.{layer}"] for layer in layers},
        depth=depth,
        final=tensors[f"layer.{depth}"],
        tokens=np.array([output.outputs[0].token_ids[0] for output in outputs]),
        computed=np.array(
            [
                len(example.token_ids) - (output.num_cached_tokens or 0)
                for example, output in zip(examples, outputs, strict=True)
            ],
            dtype=np.float64,
        ),
        moments={layer: _folds(tensors, layer) for layer in layers} if has_lens else {},
        norm_weight=tensors["norm_weight"],
        head_weight=tensors["head_weight"],
        fingerprint=facts["fingerprint"],
        layer_seconds=facts["layer_seconds"] / facts["layers_run"],
        cut_seconds=facts["cut_seconds"] / max(1, facts["rows"]),
        threads=facts["threads"],
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
