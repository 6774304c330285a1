"""Objects beside all kinds of requests, and which answers may be those of the heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from tests.conftest import tiny_engine
from tests.e2e.drafted_traffic import (
    GRAMMARS,
    LETTERS,
    Ask,
    Drafted,
    Got,
    assert_same,
    counted_drafts,
    served,
)
from tests.e2e.objects import ENGINE, POOLED_FROM, SCHEMA, THRESHOLDS, objects, save_policy
from tests.e2e.test_objects import Oracle
from tests.tiny import tiny_artifact
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.engine.compat.structured_outputs import choices_of

OBJECT = StructuredOutputsParams(json=SCHEMA)
LONGEST = objects().longest
LEVELS = {0.02: 0, 0.05: 1}  # of `tiny_config`, by epsilon
# What requests for the policy's object ask for, how often, and whether they may be early.
KINDS: list[tuple[int, bool, dict[str, Any]]] = [
    (10, True, {}),
    (3, True, {"extra_args": {"adainfer_epsilon": 0.02}}),
    (3, True, {"output_kind": RequestOutputKind.DELTA}),
    (2, True, {"stop_token_ids": list(range(34, 60))}),  # some stand in every object
    (2, False, {"extra_args": {"adainfer": 0}}),
    (1, False, {"extra_args": {"adainfer_epsilon": 0}}),
    (2, False, {"temperature": 0.8, "seed": 1}),
    (1, False, {"temperature": 1.2, "seed": 2, "top_p": 0.9, "top_k": 20, "n": 3}),
    (2, False, {"logprobs": 3}),
    (1, False, {"logprobs": 0, "temperature": 0.7, "seed": 3}),
    (1, False, {"prompt_logprobs": 1}),
    (1, False, {"stop": ["ood", "ega"]}),
    (1, False, {"min_tokens": 3}),
    (1, False, {"presence_penalty": 0.5, "frequency_penalty": 0.1}),
    (1, False, {"repetition_penalty": 1.2}),
    (1, False, {"logit_bias": {40: 2.0}}),
    (1, False, {"max_tokens": 9}),
    (1, True, {"max_tokens": LONGEST + 1}),
    (1, True, {"max_tokens": LONGEST}),  # no room for the token that ends it
    (1, False, {"ignore_eos": True}),
    (1, False, {"temperature": 0.9, "seed": 5, "n": 2}),
    (2, False, {"structured_outputs": StructuredOutputsParams(**GRAMMARS["enums"])}),
    (1, False, {"structured_outputs": StructuredOutputsParams(**GRAMMARS["choice"])}),
    (2, False, {"structured_outputs": None, "max_tokens": 12}),
    (1, False, {"structured_outputs": None, "max_tokens": 9, "temperature": 0.9, "seed": 4}),
]


@dataclass(frozen=True)
class Traffic:
    """Requests, and which of them a policy may answer early."""

    asks: list[Ask]
    of_objects: set[int]
    of_labels: set[int]


def texts(seed: int, amount: int, longest: int) -> list[str]:
    """Some go on from others, so that their first blocks are equal."""
    generator = np.random.default_rng(seed)
    found: list[str] = []
    for length in generator.integers(POOLED_FROM + 1, longest, amount).tolist():
        new = "".join(generator.choice(LETTERS, length))
        shared = found[generator.integers(len(found))] if found and generator.random() < 0.4 else ""
        found.append((shared[: length - 3] + new)[:length])
    return found


def traffic(labels: Sequence[int], seed: int, amount: int, longest: int = 110) -> Traffic:
    generator = np.random.default_rng(seed)
    prompts = texts(seed, amount // 3, longest)
    often = np.array([one for one, *_ in KINDS], dtype=float)
    made, step = Traffic([], set(), set()), 0
    for place in range(amount):
        _, may_be_early, more = KINDS[generator.choice(len(KINDS), p=often / often.sum())]
        values: dict[str, Any] = {"temperature": 0, "max_tokens": 120, "structured_outputs": OBJECT}
        if generator.random() < 0.12:
            may_be_early, more = False, {}
            values |= {"max_tokens": 1, "structured_outputs": None, "allowed_token_ids": [*labels]}
            made.of_labels.add(place)
        if may_be_early:
            made.of_objects.add(place)
        params = SamplingParams(**{**values, "output_kind": RequestOutputKind.FINAL_ONLY, **more})
        is_streamed = params.output_kind is RequestOutputKind.DELTA
        prompt = prompts[generator.integers(len(prompts))]
        made.asks.append(Ask(prompt, params, step, is_streamed=is_streamed))
        step += int(generator.choice([0, 0, 0, 1, 4]))
    return made


@dataclass
class Judged:
    """How many objects were early, and how many might have been, by the heads.

    `finished` choices ended in other tokens than stock's.
    """

    early: int = 0
    sure: int = 0
    finished: int = 0
    labels: Counter[bool] = field(default_factory=Counter)


@dataclass(frozen=True)
class Engine:
    """One that serves a policy for objects, and one for labels."""

    llm: Any
    oracle: Oracle
    label_ids: tuple[int, ...]
    labels: dict[str, torch.Tensor]

    def label(self, prompt: str) -> int:
        """What its policy for labels says of a prompt, at its first exit point."""
        state = self.oracle.states(self.oracle.tokenizer.encode(prompt))[2][0, -1]
        weight, bias = (self.labels[f"exit.2.head_{name}"] for name in ("weight", "bias"))
        return self.label_ids[int((weight @ state + bias).argmax())]

    def early_tokens(self, ask: Ask) -> list[int] | None:
        """The object that the heads are sure of, as a client gets it; None if it might not fit."""
        if ask.params.max_tokens <= self.oracle.objects.longest:
            return None
        epsilon = (ask.params.extra_args or {}).get("adainfer_epsilon", 0.05)
        tokens, _ = self.oracle.early_tokens(ask.prompt, LEVELS[epsilon])
        if tokens is None:
            return None
        whole = [*tokens, self.oracle.tokenizer.eos_token_id]
        stops = {*(ask.params.stop_token_ids or ())}
        last = next((place for place, one in enumerate(whole) if one in stops), len(whole) - 1)
        return whole[: last + 1]

    def is_finished_choice(self, ask: Ask, own: Got, stock: Got) -> bool:
        """Whether a choice is stock's up to where one was left, and then as the tokenizer has it.

        vLLM has made a grammar of it, see `choices_of`.
        """
        asked = ask.params.structured_outputs
        if asked is None or choices_of(asked.choice, asked.grammar) is None:
            return False
        assert (own.texts, own.ends) == (stock.texts, stock.ends), ask
        tokenizer, [tokens] = self.oracle.tokenizer, stock.tokens.values()
        rest = [tokenizer.encode(tokenizer.decode(tokens[cut:-1])) for cut in range(1, len(tokens))]
        return own.tokens[0] in (
            [*tokens[:cut], *one, tokens[-1]] for cut, one in enumerate(rest, start=1)
        )

    def judge(
        self,
        made: Traffic,
        ours: list[Got],
        theirs: list[Got],
        but: Collection[int] = (),
    ) -> Judged:
        """Fails unless each answer is the heads' or stock's, `but` those of some places."""
        judged, stocks = Judged(), []
        for place, (ask, own, stock) in enumerate(zip(made.asks, ours, theirs, strict=True)):
            if place in but:
                continue
            early = None
            if place in made.of_labels:
                early = [self.label(ask.prompt)]
                judged.labels[own.tokens[0] == early] += 1
            elif place in made.of_objects:
                early = self.early_tokens(ask)
                judged.sure += early is not None
            if early is not None and own.tokens[0] == early:
                judged.early += place in made.of_objects
            elif self.is_finished_choice(ask, own, stock):
                judged.finished += own.tokens != stock.tokens
            else:
                stocks.append((own, stock, ask))
        assert_same(*map(list, zip(*stocks, strict=True)))
        return judged


def engine_with(
    model: Path,
    folder: Path,
    probe: str = "label-head",
    space: str = " ",
    finish_choices: bool = True,
    thresholds: torch.Tensor = THRESHOLDS,
    **settings: Any,
) -> Engine:
    """One with random heads, whose policies are written to `folder`; `space` as in `objects`."""
    more = {"pooled_from": POOLED_FROM} if probe == "pooled-label-head" else {}
    of_objects = save_policy(model, folder / "objects", thresholds, space, probe=probe, **more)
    labels = tiny_artifact(model, folder / "labels")
    switch = {
        "artifact": {"objects": str(of_objects), "labels": str(labels)},
        "min_rows_saved": 1,
        "finish_choices": finish_choices,
    }
    llm = tiny_engine(model, switch, **{**ENGINE, **settings})
    found = load_artifact(labels)
    oracle = Oracle(model, load_artifact(of_objects))
    return Engine(llm, oracle, found.config.label_ids, found.tensors)


def run(engine: Engine, stock: Any, made: Traffic) -> tuple[Judged, Drafted]:
    """Serve it with both, and judge the answers."""
    theirs = served(stock, deepcopy(made.asks))  # vLLM writes to the parameters of requests
    with counted_drafts(engine.llm) as counted:
        found = served(engine.llm, deepcopy(made.asks))
    return engine.judge(made, found, theirs), counted
