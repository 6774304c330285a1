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
import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.config import ROW_ARG
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data import Example
from vllm_adainfer.offline.calibration.engine import start_engine, stop_engine
from vllm_adainfer.policy.artifact import Label
from vllm_adainfer.policy.bound import FloatArray
from vllm_adainfer.policy.moments import Moments
from vllm_adainfer.policy.probe import Probe, logit_lens_of

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

Ints = npt.NDArray[np.int64]

FOLDS = 5  # prompt i of the recording is in fold i % FOLDS


@dataclass(frozen=True)
class Recording:
    """What the full model did on the calibration prompts.

    Attributes:
        states: layer -> [rows, hidden size], the residual stream of the decision rows, those that
            yield a token: by prompt, and of one prompt in order.
        depth: layers of the model.
        final: [rows, hidden size], the same after the last layer (before the final norm).
        tokens: int64 [rows], what the full model answered.
        prompts: int64 [rows], which prompt each row belongs to.
        computed: [rows], token rows that the layers ran for each: one for a token after the
            first, for that all of the prompt's own that were not taken from the cache.
        moments: layer -> folds of the prompts that a lens may learn from, summed over their rows
            (all sorts of rows, see `LensSums`), with the change until the last layer as target.
        logit_lens: the model's final norm and its whole LM head.
        fingerprint: of the weights.
        layer_seconds: one layer for one token row.
        cut_seconds: cutting the batch, for one token row of it.
        threads: that the model was computed with.

    """

    states: dict[int, Tensor]
    depth: int
    final: Tensor
    tokens: Ints
    prompts: Ints
    computed: FloatArray
    moments: dict[int, list[Moments]]
    logit_lens: Probe
    fingerprint: str
    layer_seconds: float
    cut_seconds: float
    threads: int

    def rows_of(self, prompts: Ints) -> Ints:
        """Decision rows of `prompts`, in that order of the prompts."""
        order = np.full(self.prompts.max() + 1, -1)
        order[prompts] = np.arange(len(prompts))
        place = order[self.prompts]
        rows = np.flatnonzero(place >= 0)
        sorted_rows: Ints = rows[np.argsort(place[rows], kind="stable")]
        return sorted_rows


@contextmanager
def recording_engine(
    model: str,
    hf_config: Any,
    examples: Sequence[Example],
    layers: Sequence[int],
    lens_prompts: int = 0,
    max_tokens: int = 1,
) -> Iterator[LLM]:
    """An engine that keeps the states after `layers`, for `record`.

    Args:
        model: directory or hub id.
        hf_config: its config.
        examples: the longest one to come decides the engine's maximum length.
        layers: candidate exit points.
        lens_prompts: sum the rows of so many first prompts of a recording for a lens. What the
            prefix cache has of a prompt is not computed again, so a shared prefix is summed once.
        max_tokens: that will be generated after a prompt.

    """
    switch: dict[str, Any] = {"record": [*layers, hf_config.num_hidden_layers]}
    if lens_prompts:
        switch["record_lens"] = {"folds": FOLDS, "prompts": lens_prompts}
    engine = start_engine(model, examples, switch, max_tokens)
    try:
        yield engine
    finally:
        stop_engine(engine)


def record(
    engine: LLM,
    examples: Sequence[Example],
    labels: Sequence[Label],
    layers: Sequence[int],
    max_tokens: int = 1,
) -> Recording:
    """Run `examples` through an engine of `recording_engine`; each token is a decision row.

    Args:
        engine: of `recording_engine`.
        examples: the prompts.
        labels: restrict the answers, if there are any.
        layers: the engine's.
        max_tokens: that are generated after a prompt, unless it ends before.

    Raises:
        AdaInferError: a token was not recorded.

    """
    engine.reset_prefix_cache()
    outputs = engine.generate(
        [{"prompt_token_ids": example.token_ids} for example in examples],
        [greedy(labels, {ROW_ARG: row}, max_tokens) for row in range(len(examples))],
        use_tqdm=sys.stderr.isatty(),  # vLLM 0.32 divides by zero where TQDM_DISABLE is set
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "record.safetensors"
        [facts] = engine.collective_rpc("adainfer_take_record", args=(str(path),))
        tensors = load_file(path)
    depth = max(int(name.removeprefix("layer.")) for name in tensors if name.startswith("layer."))
    has_lens = any(name.startswith("lens.") for name in tensors)
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    rows = torch.from_numpy(
        rows_of_tokens(
            tensors["tags"].numpy(),
            tensors["positions"].numpy(),
            [len(example.token_ids) for example in examples],
            [len(text) for text in texts],
        )
    )
    return Recording(
        states={layer: tensors[f"layer.{layer}"][rows] for layer in layers},
        depth=depth,
        final=tensors[f"layer.{depth}"][rows],
        tokens=np.concatenate(texts),
        prompts=np.repeat(np.arange(len(examples)), [len(text) for text in texts]),
        computed=np.concatenate(
            [
                [len(example.token_ids) - (output.num_cached_tokens or 0)] + [1] * (len(text) - 1)
                for example, output, text in zip(examples, outputs, texts, strict=True)
            ]
        ).astype(np.float64),
        moments={layer: _folds(tensors, layer) for layer in layers} if has_lens else {},
        logit_lens=logit_lens_of(_named(tensors, "logit_lens."), facts["norm"]),
        fingerprint=facts["fingerprint"],
        layer_seconds=facts["layer_seconds"] / facts["layers_run"],
        cut_seconds=facts["cut_seconds"] / max(1, facts["rows"]),
        threads=facts["threads"],
    )


def rows_of_tokens(
    tags: Ints, positions: Ints, prompt_lens: Sequence[int], text_lens: Sequence[int]
) -> Ints:
    """Which recorded row decided each token: by text, and of one text in order.

    The row of a text's first token is the last of its prompt. A text may have rows beyond its end:
    where steps are scheduled ahead, one more has begun when the last token is known. A row that
    came again, after a preemption, counts as it came last.

    Args:
        tags: [rows], the text (an index) of each recorded row, in the order in which they came.
        positions: [rows], of each row in its sequence.
        prompt_lens: [texts], tokens of each one's prompt.
        text_lens: [texts], tokens that were generated after it.

    Raises:
        AdaInferError: a token has no row.

    """
    row_at = {
        place: row for row, place in enumerate(zip(tags.tolist(), positions.tolist(), strict=True))
    }
    wanted = [
        (text, prompt + number - 1)
        for text, (prompt, tokens) in enumerate(zip(prompt_lens, text_lens, strict=True))
        for number in range(tokens)
    ]
    missing = [place for place in wanted if place not in row_at]
    if missing:
        text, position = missing[0]
        raise AdaInferError(
            f"{len(missing)} of {len(wanted)} generated tokens were not recorded, the first is "
            f"token {position - prompt_lens[text] + 2} after prompt {text + 1}: this is a fault of "
            "vllm-adainfer's or vLLM's scheduling, please report it with the command"
        )
    return np.array([row_at[place] for place in wanted], dtype=np.int64)


def _named(record: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in record.items() if name.startswith(prefix)}


def _folds(record: dict[str, Tensor], layer: int) -> list[Moments]:
    """The moments of one layer, as `LensSums.take` named their parts."""
    names = [field.name for field in fields(Moments)]
    return [
        Moments(**{name: record[f"lens.{layer}.{fold}.{name}"] for name in names})
        for fold in range(FOLDS)
    ]


def greedy(
    labels: Sequence[Label], extra_args: dict[str, Any] | None = None, max_tokens: int = 1
) -> SamplingParams:
    """Greedy parameters, restricted to `labels` if there are any."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        allowed_token_ids=[label.token_id for label in labels] or None,
        extra_args=extra_args,
    )
