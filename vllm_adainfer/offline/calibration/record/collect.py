"""Collect: run prompts at full depth in vLLM and record the states that probes are fitted on.

Doctor and evaluations ask in the same way: for a greedy token, or a classifier's probabilities.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.branch_shapes import MOST_BRANCH_TOKENS
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.recording.moments import moments_of
from vllm_adainfer.exits.recording.recorder import MEAN, check_room
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.calibration.record.rows import (
    FOLDS,
    Rows,
    ServedModel,
    by_layer,
    load_shards,
    own_states_of,
    read_shards,
)
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.policy.probe import logit_lens_of
from vllm_adainfer.settings.instruments import ROW_ARG

if TYPE_CHECKING:
    from vllm import LLM, PoolingParams, SamplingParams
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True)
class Plan:
    """What to record of some prompts; each token of an answer is a decision row.

    Attributes:
        layers: the candidate exit points, after which to keep the states of decision rows.
        labels: the token ids that answers are restricted to, if any; an example's own come first.
        max_tokens: tokens to generate after a prompt, unless the text ends earlier.
        lens_prompts: the rows of so many first prompts are summed for tuned lenses.
        pooled_from: the position from which on to take the mean of each prompt's states.
        branches: layers after which to keep each of these states instead.

    """

    layers: Sequence[int]
    labels: Sequence[int] = ()
    max_tokens: int = 1
    lens_prompts: int = 0
    pooled_from: int | None = None
    branches: Sequence[int] = ()


def recorded(
    model: str,
    hf_config: Any,
    examples: Sequence[Example],
    plan: Plan,
    adapter: LoRARequest | None = None,
    **settings: Any,
) -> Rows:
    """Run `examples` through an engine of their own, perhaps with an adapter; see `start_engine`.

    An AdaInferError if the engine cannot start, or a token was not recorded.
    """
    switch: dict[str, Any] = {"record": [*plan.layers, hf_config.num_hidden_layers]}
    if plan.lens_prompts:
        switch["record_lens"] = {"folds": FOLDS, "prompts": plan.lens_prompts}
    if plan.pooled_from is not None:
        switch["record_pooled_from"] = plan.pooled_from
    with tempfile.TemporaryDirectory() as directory:
        if plan.branches:
            own = (len(example.token_ids) - (plan.pooled_from or 0) for example in examples)
            tokens = sum(min(max(count, 0), MOST_BRANCH_TOKENS) for count in own)
            check_room(directory, tokens, hf_config.hidden_size, plan.branches)
            switch["record_states"] = {"layers": [*plan.branches], "directory": directory}
        engine = start_engine(model, examples, switch, plan.max_tokens, **settings)
        try:
            return record(engine, examples, plan, adapter)
        finally:
            stop_engine(engine)


def greedy(
    labels: Sequence[int],
    extra_args: dict[str, Any] | None = None,
    max_tokens: int = 1,
    reuse_prefixes: bool = True,
) -> SamplingParams:
    """Parameters for greedy decoding, restricted to `labels`, token ids, if there are any.

    `reuse_prefixes`: whether tokens in vLLM's prefix cache are not run again.
    """
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        allowed_token_ids=list(labels) or None,
        extra_args=extra_args,
        skip_reading_prefix_cache=None if reuse_prefixes else True,
    )


def scores_of(
    extra_kwargs: dict[str, Any] | None = None, reuse_prefixes: bool = True
) -> PoolingParams:
    """Parameters for the probabilities of a classifier; see `greedy`."""
    from vllm import PoolingParams

    return PoolingParams(
        task="classify",
        skip_reading_prefix_cache=not reuse_prefixes,
        extra_kwargs=extra_kwargs,
    )


def best_column(probabilities: Tensor) -> int:
    """The best label of a classifier, by its probabilities, fp32 [columns]."""
    if len(probabilities) == 1:
        return int(probabilities[0] > 0.5)
    return int(probabilities.argmax())


def recorded_bar(prompts: Iterable[Any] | None = None, **options: Any) -> Any:
    """The progress bar of vLLM, which calls this to render prompts and again to run them."""
    return progress(**{**options, "desc": "record"}) if prompts is None else prompts


def record(
    engine: LLM, examples: Sequence[Example], plan: Plan, adapter: LoRARequest | None = None
) -> Rows:
    """Run `examples` through an engine that records as `recorded` tells its one to.

    Rows in the prefix cache are not run again, so a shared prefix counts once.

    An AdaInferError if a token was not recorded.
    """
    engine.reset_prefix_cache()
    classifies = engine.llm_engine.model_config.runner_type == "pooling"

    def run(rows: Sequence[int], reuse_prefixes: bool) -> list[Any]:
        prompts = [{"prompt_token_ids": examples[row].token_ids} for row in rows]
        if classifies:
            scored = [scores_of({ROW_ARG: row}, reuse_prefixes) for row in rows]
            return engine.encode(prompts, scored, pooling_task="classify", use_tqdm=recorded_bar)
        return engine.generate(
            prompts,
            [
                greedy(
                    examples[row].labels or plan.labels,
                    {ROW_ARG: row},
                    plan.max_tokens,
                    reuse_prefixes,
                )
                for row in rows
            ],
            lora_request=adapter,
            use_tqdm=recorded_bar,
        )

    outputs = run(range(len(examples)), reuse_prefixes=True)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows, sums, facts = taken_from(engine, folder)
        if again := not_seen_whole(rows, sums):
            # They share more than all prompts do, so some of their states were in the prefix cache.
            run(again, reuse_prefixes=False)
            rows, sums, _ = taken_from(engine, folder)
        head = load_file(folder / "head.safetensors")
    texts = [
        [best_column(output.outputs.data)] if classifies else list(output.outputs[0].token_ids)
        for output in outputs
    ]
    wanted = [
        (text, len(example.token_ids) + number - 1)
        for text, (example, tokens) in enumerate(zip(examples, texts, strict=True))
        for number in range(len(tokens))
    ]
    order = torch.from_numpy(rows_at(wanted, rows))
    states = {layer: state[order] for layer, state in by_layer(rows).items()}
    return Rows(
        model=ServedModel.of_facts(facts, logit_lens_of(head, facts["norm"])),
        states={layer: states[layer] for layer in plan.layers},
        final=rows["final"][order],
        tokens=np.concatenate(texts),
        prompts=np.repeat(np.arange(len(examples)), [len(text) for text in texts]),
        computed=np.concatenate(
            [
                [len(example.token_ids) - (output.num_cached_tokens or 0)] + [1] * (len(text) - 1)
                for example, output, text in zip(examples, outputs, texts, strict=True)
            ]
        ).astype(np.float64),
        means={layer: mean[order] for layer, mean in by_layer(rows, MEAN).items()},
        moments=moments_of(sums),
        own_states=own_states_of(facts["states"], sums, rows["final"], len(examples)),
    )


def taken_from(
    engine: LLM, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Rows, sums and facts that the engine has recorded; see `adainfer_take_record`."""
    [facts] = engine.collective_rpc("adainfer_take_record", args=(str(folder),))
    return load_shards(read_shards(folder)), load_file(folder / "sums.safetensors"), facts


def not_seen_whole(rows: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> list[int]:
    """Record rows of prompts of which some states never ran, though all are to be read."""
    tags, whole = rows["tags"], sums.get("states.tags")
    if whole is not None:
        return tags[~torch.isin(tags, whole)].tolist()
    means = [*by_layer(rows, MEAN).values()]
    return tags[means[0].isnan().any(dim=1)].tolist() if means else []


def rows_at(wanted: Sequence[tuple[int, int]], rows: Mapping[str, Tensor]) -> Ints:
    """The recorded rows at the `wanted` places: a text, and a position there.

    The last row of the prompt decides a text's first token. A text may have rows beyond its end: if
    steps are scheduled ahead, one more has begun when the last token is known. Of a row that ran
    twice, because of a preemption, the second run counts. `rows` are in the order they were run.

    An AdaInferError if a place has no row.
    """
    places = zip(rows["tags"].tolist(), rows["positions"].tolist(), strict=True)
    row_at = {place: row for row, place in enumerate(places)}
    missing = [place for place in wanted if place not in row_at]
    if missing:
        text, position = missing[0]
        raise AdaInferError(
            f"{len(missing)} of {len(wanted)} rows that decide an answer were not recorded, the "
            f"first at position {position} of prompt {text + 1}: this is a bug in vllm-adainfer or "
            "in vLLM's scheduling; please report it with the command"
        )
    return np.array([row_at[place] for place in wanted], dtype=np.int64)
