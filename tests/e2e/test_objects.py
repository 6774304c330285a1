"""Objects that are decided early are those of the heads; all others are stock vLLM's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from vllm.sampling_params import RequestOutputKind

from tests.byte_model import byte_tokenizer, save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.drafted_traffic import Ask, assert_same, counted_drafts, prompts, served
from tests.e2e.objects import ENGINE, POOLED_FROM, SCHEMA, params, save_policy
from tests.e2e.test_async_scheduling import asynchronous_scheduling
from tests.e2e.test_object_shadows import lines_of
from tests.full import full_on_v2, needed
from tests.tiny import EXIT_POINTS, LAYERS
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.objects import Schema
from vllm_adainfer.offline.calibration.record.collect import Plan
from vllm_adainfer.offline.calibration.record.objects import Untaught, record
from vllm_adainfer.policy.guesser import Guesser


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory) -> Callable[[str], Path]:
    def made(probe: str) -> Path:
        directory = tmp_path_factory.mktemp("artifact") / "policy"
        more = {"pooled_from": POOLED_FROM} if probe == "pooled-label-head" else {}
        return save_policy(model, directory, probe=probe, **more)

    return made


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return tiny_engine(model, None, **ENGINE)


class Oracle:
    """What heads say of an object, by plain transformers."""

    def __init__(self, model: Path, artifact: Artifact) -> None:
        self.model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.artifact, self.tokenizer = artifact, byte_tokenizer()
        found = artifact.config.objects
        assert found is not None
        self.objects, self.guesser = found, Guesser.of(artifact)

    @torch.no_grad()
    def states(self, tokens: list[int]) -> tuple[torch.Tensor, ...]:
        """After so many layers, the states of the rows of these tokens."""
        return self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states

    def early(self, prompt: str, level: int) -> tuple[str | None, int | None]:
        """The text that is written early, and after which layer; None for neither."""
        tokens, layer = self.early_tokens(prompt, level)
        return None if tokens is None else self.tokenizer.decode(tokens), layer

    def early_tokens(self, prompt: str, level: int) -> tuple[tuple[int, ...] | None, int | None]:
        """Its tokens, and after which layer."""
        shares, layer = self.early_shares(prompt, level)
        if shares is None:
            return None, None
        return self.objects.written([int(one.argmax()) for one in shares]), layer

    def early_shares(self, prompt: str, level: int) -> tuple[list[torch.Tensor] | None, int | None]:
        """How probable each value of each field is, and after which layer."""
        config, tensors = self.artifact.config, self.artifact.tensors
        ids = self.tokenizer.encode(prompt)
        guess = self.guesser.places(ids)
        rows = torch.tensor(self.objects.rows(guess)) + len(ids) - 1
        states = self.states([*ids, *self.objects.written(guess)])
        for index, layer in enumerate(config.exit_points):
            read = states[layer][0, rows]
            if config.is_pooled:
                normed = states[layer][0] / states[layer][0].pow(2).mean(-1, True).add(1e-6).sqrt()
                mean = normed[POOLED_FROM : len(ids)].mean(0)
                read = torch.cat([normed[rows], mean.expand(len(rows), -1)], dim=1)
            weight, bias = (tensors[f"exit.{layer}.head_{name}"] for name in ("weight", "bias"))
            sizes = [len(one.values) for one in self.objects.fields]
            weight, bias = weight[: sum(sizes)], bias[: sum(sizes)]  # behind them is the label mass
            shares = [
                (own @ row + at).softmax(0)
                for row, own, at in zip(read, weight.split(sizes), bias.split(sizes), strict=True)
            ]
            gaps = [(two := one.topk(2).values)[0] - two[1] for one in shares]
            if min(gaps) >= tensors["thresholds"][level, index]:
                return shares, layer
        return None, None


@pytest.mark.parametrize("probe", needed(1 if IS_V2 else 2, of=["label-head", "pooled-label-head"]))
def test_objects_are_those_of_the_heads_where_these_are_sure_and_stocks_elsewhere(
    model, policy, stock, probe
):
    artifact = policy(probe)
    switch = {"artifact": str(artifact), "min_rows_saved": 1}
    with asynchronous_scheduling() if IS_V2 else nullcontext():  # as on a GPU
        ours = tiny_engine(model, switch, **ENGINE)
    oracle = Oracle(model, load_artifact(artifact))
    texts = [one for one in prompts(3, 16 if IS_V2 else 40, 100) if len(one) > POOLED_FROM]
    asks = [Ask(text, params(), step=place // 3) for place, text in enumerate(texts)]
    theirs = served(stock, asks)
    with counted_drafts(ours):
        found = served(ours, asks)
    early, depths = 0, {}
    for ask, own, other in zip(asks, found, theirs, strict=True):
        expected, layer = oracle.early(ask.prompt, level=1)
        early += expected is not None
        if layer is not None:
            depths[layer] = depths.get(layer, 0) + 1
        assert own.texts[0] == (expected or other.texts[0]), ask
        assert own.ends[0][0] == ("stop" if expected else other.ends[0][0])
    some = len(asks) // 8
    assert some < early < len(asks) - some, early
    assert len(depths) > 1


@full_on_v2
def test_log_probabilities_are_those_of_the_heads_where_an_object_is_early_and_stocks_elsewhere(
    model, stock, tmp_path
):
    """Under a tolerance. Beside the values that are written stand the others of each field."""
    artifact = save_policy(model, tmp_path / "policy", risk="probability", tolerance=0.2)
    switch = {
        "artifact": str(artifact),
        "min_rows_saved": 1,
        "audit": {"directory": str(tmp_path / "audit")},
    }
    ours, oracle = tiny_engine(model, switch, **ENGINE), Oracle(model, load_artifact(artifact))
    streamed = RequestOutputKind.DELTA
    kinds = [{"logprobs": 4}, {"logprobs": 1}, {}, {"logprobs": 4, "output_kind": streamed}]
    asks = [
        Ask(
            text,
            params(**kinds[place % len(kinds)]),
            step=place // 3,
            is_streamed="output_kind" in kinds[place % len(kinds)],
        )
        for place, text in enumerate(prompts(9, 12 if IS_V2 else 24, 100))
    ]
    theirs, found = served(stock, asks), served(ours, asks)
    early, at_full_depth, expected_fields = set(), [], {}
    for place, (ask, own) in enumerate(zip(asks, found, strict=True)):
        shares, _ = oracle.early_shares(ask.prompt, level=1)
        if shares is None:
            at_full_depth.append(place)
            continue
        early.add(place)
        places = [int(one.argmax()) for one in shares]
        assert own.tokens[0][:-1] == [*oracle.objects.written(places)], ask
        if ask.params.logprobs is None:
            assert own.logprobs[0] == []
            continue
        by_place = {  # what may stand at a token that decides
            begin: {
                value.written[0]: float(share)
                for value, share in zip(field.values, one, strict=True)
            }
            for begin, field, one in zip(
                _begins(oracle.objects, places), oracle.objects.fields, shares, strict=True
            )
        }
        assert len(own.logprobs[0]) == len(own.tokens[0])
        for at, (token, others) in enumerate(zip(own.tokens[0], own.logprobs[0], strict=True)):
            told = {one: math.exp(logprob.logprob) for one, logprob in others.items()}
            likely = {one: share for one, share in told.items() if share > 0}
            expected = by_place.get(at, {token: 1.0})
            if ask.params.logprobs == 1:
                expected = {one: expected[one] for one in (token, max(expected, key=expected.get))}
            assert likely == pytest.approx(expected, abs=1e-4), (ask, at)
            assert others[token].rank == 1
        if ask.params.logprobs > 1:
            expected_fields[place] = {
                field.path: {
                    value.text.strip('"'): pytest.approx(float(share), abs=1e-3)
                    for value, share in zip(field.values, one, strict=True)
                }
                for field, one in zip(oracle.objects.fields, shares, strict=True)
            }
    assert len(asks) // 6 < len(early) < len(asks) - len(asks) // 6
    assert_same(*([one[place] for place in at_full_depth] for one in (found, theirs, asks)))
    assert {asks[place].params.logprobs for place in early} == {None, 1, 4}
    assert {asks[place].params.logprobs for place in at_full_depth} >= {1, 4}
    lines = lines_of(tmp_path / "audit", len(asks))
    assert {place: lines[place]["fields"] for place in expected_fields} == expected_fields


def _begins(objects: Objects, places: list[int]) -> list[int]:
    """Where the value of each field begins in the object with these."""
    found, at = [], len(objects.start)
    for field, place in zip(objects.fields, places, strict=True):
        found.append(at)
        at += len(field.values[place].written)
    return found


@pytest.mark.skipif(IS_V2, reason="the rows of a step are the same on both runners")
def test_heads_learn_from_the_rows_behind_a_guess_for_each_text_and_from_full_depths_objects(model):
    texts = [one for one in prompts(5, 24, 100) if len(one) > POOLED_FROM]
    oracle_model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer, random = byte_tokenizer(), np.random.default_rng(0)
    examples = [Example(text, text, tokenizer.encode(text), None) for text in texts]
    guessed: list[list[int]] = []

    def teach(found: Objects, answers: Ints) -> tuple[Guesser, Sequence[Sequence[int]]]:
        assert len(answers) == 8
        guessed.extend(random.integers(0, found.link.sizes, (len(texts), 3)).tolist())
        return Guesser.of_commonest(found, SharedTokens()), guessed

    switch = {"record": [*EXIT_POINTS, LAYERS], "record_objects": True}
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
    own = {**ENGINE, "structured_outputs_config": grammars}
    ours = tiny_engine(model, {**switch, "record_pooled_from": POOLED_FROM}, **own)
    plan = Plan(EXIT_POINTS, pooled_from=POOLED_FROM)
    schema = Schema.of(json.dumps(SCHEMA), "the schema")
    untaught = Untaught(np.arange(8), teach)
    rows, guesser = record(ours, examples, plan, schema, tokenizer, 120, None, untaught)
    theirs = served(ours, [Ask(text, params()) for text in texts])
    found = guesser.objects
    assert rows.tokens.tolist() == [found.code_of(one.texts[0]) for one in theirs]
    assert len(set(map(tuple, guessed))) > 4
    with torch.no_grad():
        for place, (example, guess) in enumerate(zip(examples, guessed, strict=True)):
            ids = torch.tensor([[*example.token_ids, *found.written(guess)]])
            states = oracle_model(ids, output_hidden_states=True).hidden_states
            where = torch.tensor(found.rows(guess)) + len(example.token_ids) - 1
            for layer in EXIT_POINTS:
                own = rows.states[layer][place].float()
                assert torch.allclose(own, states[layer][0, where], atol=1e-4)
                whole = states[layer][0, POOLED_FROM : len(example.token_ids)]
                normed = whole / whole.pow(2).mean(-1, True).add(1e-6).sqrt()
                assert torch.allclose(rows.means[layer][place], normed.mean(0), atol=1e-3)
