"""Record objects: the states at the rows of a guessed object, and what full depth writes.

The model's first answers say how it writes objects, and those to the prompts that fit what to guess
of a text. Then each prompt runs with the rows of its guess behind it, and goes on to the end of its
own answer. Nothing is learnt from the held-out prompts. A prompt that fits gets its guess from the
answers to others, so that heads learn beside guesses as good as those of prompts to come.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.recording.recorder import MEAN
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.objects import Schema, objects_of
from vllm_adainfer.offline.calibration.data.served_schema import longest_object
from vllm_adainfer.offline.calibration.record.collect import (
    Plan,
    recorded_bar,
    rows_at,
    taken_from,
)
from vllm_adainfer.offline.calibration.record.engine import BLOCK, start_engine, stop_engine
from vllm_adainfer.offline.calibration.record.rows import Rows, ServedModel, by_layer
from vllm_adainfer.offline.calibration.record.values import best_tokens, values_of_answers
from vllm_adainfer.policy.guesser import Guesser
from vllm_adainfer.policy.probe import logit_lens_of
from vllm_adainfer.settings.instruments import GUESS_ARG, GUESS_ROWS_ARG, ROW_ARG

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

FIRST = 200  # prompts whose answers decide the guess
TOGETHER = (16, 1)  # prompts of which some found no room in a step for their guess, run again
LONGEST = 4  # times as many tokens as the tokenizer needs for an object that a model may take


@dataclass(frozen=True)
class Untaught:
    """What a guesser is made of while the prompts run.

    Attributes:
        fit: int64 [prompts that fit], whose answers teach; the first prompts are among them.
        teach: gets how the model writes objects, and the places of the values in those answers,
            int64 [prompts that fit, fields]; returns the guesser, and its guess for each prompt.

    """

    fit: Ints
    teach: Callable[[Objects, Ints], tuple[Guesser, Sequence[Sequence[int]]]]


def recorded_objects(
    model: str,
    hf_config: Any,
    examples: Sequence[Example],
    plan: Plan,
    schema: Schema,
    tokenizer: Any,
    guesser: Guesser | Untaught,
    adapter: LoRARequest | None = None,
    **settings: Any,
) -> tuple[Rows, Guesser]:
    """Run `examples` through an engine of their own, see `recorded`; and what guesses objects.

    That is the policy's `guesser`, if there is one; else the answers teach it.

    An AdaInferError if the engine cannot start, or an answer is no object of the schema.
    """
    switch: dict[str, Any] = {"record": [*plan.layers, hf_config.num_hidden_layers]}
    switch["record_objects"] = True
    settings = {"max_logprobs": best_tokens(schema.fields.values()), **settings}
    if plan.pooled_from is not None:
        switch["record_pooled_from"] = plan.pooled_from
    longest = LONGEST * (len(tokenizer.encode(schema.text)) + 16)
    if isinstance(guesser, Guesser):
        longest = longest_object(guesser.objects)
    longest = min(longest, room_for_answers(hf_config.max_position_embeddings, examples))
    engine = start_engine(model, examples, switch, longest, **settings)
    try:
        return record(engine, examples, plan, schema, tokenizer, longest, adapter, guesser)
    finally:
        stop_engine(engine)


def room_for_answers(context: int, examples: Sequence[Example]) -> int:
    """The most tokens that an answer may have behind each prompt, of a model with this context.

    An AdaInferError if there is none.
    """
    longest = max(examples, key=lambda example: len(example.token_ids))
    room = context // BLOCK * BLOCK - len(longest.token_ids)
    if room < 1:
        raise AdaInferError(
            f"{longest.place}: a prompt of {len(longest.token_ids)} tokens leaves no room for an "
            f"object in the model's context of {context}: leave this row out"
        )
    return room


def record(
    engine: LLM,
    examples: Sequence[Example],
    plan: Plan,
    schema: Schema,
    tokenizer: Any,
    max_tokens: int,
    adapter: LoRARequest | None,
    guesser: Guesser | Untaught,
) -> tuple[Rows, Guesser]:
    """Run `examples` through an engine with `record_objects`; see `recorded_objects`."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    end = tokenizer.eos_token_id

    def answers(
        rows: Sequence[int],
        extra_args: Sequence[Mapping[str, Any] | None],
        reuse_prefixes: bool = True,
        logprobs: int | None = None,
    ) -> list[Any]:
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                structured_outputs=StructuredOutputsParams(json=schema.text),
                extra_args=own and {**own},
                skip_reading_prefix_cache=None if reuse_prefixes else True,
                logprobs=logprobs,
                flat_logprobs=True,
                detokenize=False,
            )
            for own in extra_args
        ]
        prompts = [{"prompt_token_ids": examples[row].token_ids} for row in rows]
        found: list[Any] = engine.generate(
            prompts, params, lora_request=adapter, use_tqdm=recorded_bar
        )
        return found

    def without_end(output: Any) -> list[int]:
        return [token for token in output.outputs[0].token_ids if token != end]

    def places_of(row: int, output: Any) -> Sequence[int]:
        text = tokenizer.decode(without_end(output))
        places = schema.places(text)
        if places is None:
            raise AdaInferError(
                f"{examples[row].place}: the model answers {text!r:.200}, which is no object of "
                "the schema: leave this row out"
            )
        return places

    if isinstance(guesser, Untaught):
        fit = guesser.fit.tolist()
        plain = answers(fit, [None] * len(fit))
        objects = objects_of(schema, [*map(without_end, plain[:FIRST])], tokenizer)
        guesser, guesses = guesser.teach(objects, np.array([*map(places_of, fit, plain)]))
        engine.reset_prefix_cache()
    else:
        objects, guesses = guesser.objects, [guesser.places(one.token_ids) for one in examples]
    recorded: list[dict[str, Any]] = [
        {
            ROW_ARG: row,
            GUESS_ARG: list(objects.written(places)),
            GUESS_ROWS_ARG: list(objects.rows(places)),
        }
        for row, places in enumerate(guesses)
    ]
    logprobs = best_tokens(schema.fields.values())
    outputs = answers(range(len(examples)), recorded, logprobs=logprobs)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows, _, facts = taken_from(engine, folder)
        for together in TOGETHER:
            again = _not_recorded(rows, len(examples))
            for start in range(0, len(again), together):
                some = again[start : start + together]
                answers(some, [recorded[row] for row in some], reuse_prefixes=False)
            if again:
                rows, _, _ = taken_from(engine, folder)
        head = load_file(folder / "head.safetensors")
    codes = [objects.link.code_of(places_of(row, one)) for row, one in enumerate(outputs)]
    wanted = [
        (row, len(example.token_ids) - 1 + behind)
        for row, example in enumerate(examples)
        for behind in recorded[row][GUESS_ROWS_ARG]
    ]
    order = torch.from_numpy(rows_at(wanted, rows))

    def by_field(states: Tensor) -> Tensor:
        return states[order].view(len(examples), len(objects.fields), -1)

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
                    len(one.token_ids) - (output.num_cached_tokens or 0) + len(own[GUESS_ARG])
                    for one, output, own in zip(examples, outputs, recorded, strict=True)
                ],
                dtype=np.float64,
            ),
            means={layer: by_field(mean)[:, 0] for layer, mean in by_layer(rows, MEAN).items()},
            values=values_of_answers(
                objects, codes, [one.outputs[0].logprobs for one in outputs], tokenizer
            ),
        ),
        guesser,
    )


def _not_recorded(rows: Mapping[str, Tensor], prompts: int) -> list[int]:
    """Record rows of prompts whose step had no room for the guess, or that were not seen whole.

    The latter share more than all prompts do, so some of their states were in the prefix cache. Of
    a prompt that ran twice, the second run counts.
    """
    means = [*by_layer(rows, MEAN).values()]
    lacks = means[0].isnan().any(dim=1) if means else torch.zeros(len(rows["tags"]))
    last = dict(zip(rows["tags"].tolist(), lacks.tolist(), strict=True))
    return [row for row in range(prompts) if last.get(row, True)]
