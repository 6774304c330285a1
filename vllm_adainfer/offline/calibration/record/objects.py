"""Record objects: the states at the rows of a guessed object, and what full depth writes.

The model's first answers say which object is the best guess. Then each prompt runs with its rows
behind it, and goes on to the end of its own answer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.objects import Schema, objects_of
from vllm_adainfer.offline.calibration.data.served_schema import longest_object
from vllm_adainfer.offline.calibration.record.collect import (
    Plan,
    not_seen_whole,
    recorded_bar,
    rows_at,
    taken_from,
)
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.calibration.record.rows import Rows, ServedModel, by_layer
from vllm_adainfer.offline.calibration.record.values import best_tokens, values_of_answers
from vllm_adainfer.offline.progress import say
from vllm_adainfer.policy.probe import logit_lens_of
from vllm_adainfer.settings.instruments import GUESS_ARG, ROW_ARG

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

FIRST = 200  # prompts whose answers decide the guess
LONGEST = 4  # times as many tokens as the tokenizer needs for an object that a model may take


def recorded_objects(
    model: str,
    hf_config: Any,
    examples: Sequence[Example],
    plan: Plan,
    schema: Schema,
    tokenizer: Any,
    adapter: LoRARequest | None = None,
    objects: Objects | None = None,
    **settings: Any,
) -> tuple[Rows, Objects]:
    """Run `examples` through an engine of their own, see `recorded`; and how it writes objects.

    `objects` are those of a policy, if there is one; else the first answers tell.

    An AdaInferError if the engine cannot start, or an answer is no object of the schema.
    """
    switch: dict[str, Any] = {"record": [*plan.layers, hf_config.num_hidden_layers]}
    switch["record_objects"] = True
    settings = {"max_logprobs": best_tokens(schema.fields.values()), **settings}
    if plan.pooled_from is not None:
        switch["record_pooled_from"] = plan.pooled_from
    longest = LONGEST * (len(tokenizer.encode(schema.text)) + 16)
    if objects is not None:
        longest = longest_object(objects)
    engine = start_engine(model, examples, switch, longest, **settings)
    try:
        return _record(engine, examples, plan, schema, tokenizer, longest, adapter, objects)
    finally:
        stop_engine(engine)


def _record(
    engine: LLM,
    examples: Sequence[Example],
    plan: Plan,
    schema: Schema,
    tokenizer: Any,
    max_tokens: int,
    adapter: LoRARequest | None,
    objects: Objects | None,
) -> tuple[Rows, Objects]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    end = tokenizer.eos_token_id

    def answers(
        rows: Sequence[int],
        guess: Sequence[int] = (),
        reuse_prefixes: bool = True,
        logprobs: int | None = None,
    ) -> list[Any]:
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                structured_outputs=StructuredOutputsParams(json=schema.text),
                extra_args={ROW_ARG: row, GUESS_ARG: list(guess)} if guess else None,
                skip_reading_prefix_cache=None if reuse_prefixes else True,
                logprobs=logprobs,
                flat_logprobs=True,
                detokenize=False,
            )
            for row in rows
        ]
        prompts = [{"prompt_token_ids": examples[row].token_ids} for row in rows]
        found: list[Any] = engine.generate(
            prompts, params, lora_request=adapter, use_tqdm=recorded_bar
        )
        return found

    def without_end(output: Any) -> list[int]:
        return [token for token in output.outputs[0].token_ids if token != end]

    if objects is None:
        first = [*map(without_end, answers(range(min(FIRST, len(examples)))))]
        objects = objects_of(schema, first, tokenizer)
        say(f"behind each prompt stands {tokenizer.decode(objects.guess)}")
    engine.collective_rpc("adainfer_record_fields", args=(list(objects.rows),))
    engine.reset_prefix_cache()
    logprobs = best_tokens(schema.fields.values())
    outputs = answers(range(len(examples)), objects.guess, logprobs=logprobs)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows, sums, facts = taken_from(engine, folder)
        if again := sorted({*not_seen_whole(rows, sums), *_not_guessed(rows, len(examples))}):
            answers(again, objects.guess, reuse_prefixes=False)
            rows, sums, _ = taken_from(engine, folder)
        head = load_file(folder / "head.safetensors")
    codes = []
    for example, output in zip(examples, outputs, strict=True):
        text = tokenizer.decode(without_end(output))
        places = schema.places(text)
        if places is None:
            raise AdaInferError(
                f"{example.place}: the model answers {text!r:.200}, which is no object of the "
                "schema: leave this row out"
            )
        codes.append(objects.link.code_of(places))
    wanted = [
        (row, len(example.token_ids) - 1 + behind)
        for row, example in enumerate(examples)
        for behind in objects.rows
    ]
    order = torch.from_numpy(rows_at(wanted, rows))

    def by_field(states: Tensor) -> Tensor:
        return states[order].view(len(examples), len(objects.rows), -1)

    kept = {layer: state for layer, state in by_layer(rows).items() if layer in plan.layers}
    return (
        Rows(
            model=ServedModel.of_facts(facts, logit_lens_of(head, facts["norm"])),
            states={layer: by_field(state) for layer, state in kept.items()},
            final=by_field(rows["final"]),
            tokens=np.array(codes),
            prompts=np.arange(len(examples)),
            computed=np.array(
                [
                    len(example.token_ids) - (output.num_cached_tokens or 0) + len(objects.guess)
                    for example, output in zip(examples, outputs, strict=True)
                ],
                dtype=np.float64,
            ),
            means={layer: by_field(mean)[:, 0] for layer, mean in by_layer(rows, "mean.").items()},
            values=values_of_answers(
                objects, codes, [one.outputs[0].logprobs for one in outputs], tokenizer
            ),
        ),
        objects,
    )


def _not_guessed(rows: Mapping[str, Tensor], prompts: int) -> list[int]:
    """Record rows of prompts whose step had no room for the guess."""
    return sorted(set(range(prompts)) - set(rows["tags"].tolist()))
