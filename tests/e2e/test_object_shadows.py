"""Shadow requests for objects close a policy whose objects are not those of full depth."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.admitted import draw_by_the_clients_ids
from tests.byte_model import save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.drafted_traffic import Ask, Got, place_of, prompts, scheduler_of, served
from tests.e2e.objects import ENGINE, THRESHOLDS, objects, params, save_policy
from tests.tiny import EXIT_POINTS, LAYERS
from tests.waiting import wait_for
from vllm_adainfer import stats
from vllm_adainfer.exits.accounting.report import DecidedObject
from vllm_adainfer.settings.engine import NO_POLICY

TEXT = params(structured_outputs=None, max_tokens=3, ignore_eos=True)
ASKS = [
    Ask(text, TEXT if place % 5 == 0 else params(), step=place // 2)
    for place, text in enumerate(prompts(5, 80, 60))
]
# Random weights would go on with white space for ever.
WHOLE = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
ALL_SETTLE = torch.full_like(THRESHOLDS, -1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def stock(model) -> list[Got]:
    return served(tiny_engine(model, None, **ENGINE | WHOLE), ASKS)


def code(text: str) -> int:
    found, asked = json.loads(text), objects()
    values = [[json.loads(one.text) for one in field.values] for field in asked.fields]
    fields = zip(asked.fields, values, strict=True)
    return asked.link.code_of([own.index(found[field.path]) for field, own in fields])


def note_decided(llm: Any) -> dict[int, DecidedObject]:
    """The objects that policies decide from now on, by the place of the request."""
    observer, found = scheduler_of(llm)._objects, {}
    stepped = observer.stepped

    def noting(step: Any) -> None:
        decided = {} if step.note is None else step.note.objects
        found.update({place_of(name): one for name, one in decided.items()})
        stepped(step)

    observer.stepped = noting
    return found


def lines_of(directory: Path, count: int) -> dict[int, dict[str, Any]]:
    """Those of the audit, by the place of the request, once so many are written."""

    def lines() -> list[str]:
        return [line for path in directory.iterdir() for line in path.open()]

    wait_for(lambda: len(lines()) >= count)
    return {place_of(line["request"]): line for line in map(json.loads, lines())}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_random_heads_are_closed_by_whole_objects_and_counters_and_audit_say_who_decided(
    model, stock, tmp_path, monkeypatch, request, ranks
):
    audit = tmp_path / "audit"
    switch = {
        "artifact": {"reviews": str(save_policy(model, tmp_path / "policy", ALL_SETTLE, ""))},
        "min_rows_saved": 1,
        "shadow_rate": 0.5,
        "audit": {"directory": str(audit)},
    }
    if ranks > 1:
        request.getfixturevalue("ranks_on_cores")
    draw_by_the_clients_ids("admission.admission", monkeypatch)
    ours = tiny_engine(model, switch, **ENGINE | WHOLE, tensor_parallel_size=ranks)
    decided = note_decided(ours)
    found = served(ours, ASKS)
    ours.llm_engine.step()  # as a server does once its last request has ended

    early = {place for place, one in decided.items() if one.is_early}
    compared = decided.keys() - early
    for place, (own, other) in enumerate(zip(found, stock, strict=True)):
        same = code(own.texts[0]) == decided[place].code if place in early else own == other
        assert same, ASKS[place]
    counted = stats(ours)
    own = counted["policies"]["reviews"]
    [strict, loose] = own["shadow"].values()
    differ = sum(code(stock[place].texts[0]) != decided[place].code for place in compared)
    assert (strict["checked"], loose["checked"]) == (0, len(compared))
    assert loose["disagreed"] == differ > len(compared) / 2
    assert loose["tightened"]
    assert 0 < len(early) + len(compared) < 64, "it closes while they come"

    assert own["exit_histogram"] == {EXIT_POINTS[0]: len(early), LAYERS: len(compared)}
    lines = lines_of(audit, len(ASKS))
    layers: dict[str, Counter[int]] = {"reviews": Counter(), NO_POLICY: Counter()}
    for place, line in lines.items():
        count = layers[line["policy"] or NO_POLICY]
        count.update({int(depth): tokens for depth, tokens in line["layers"].items()})
        if place in early:
            facts = [line[one] for one in ("policy", "epsilon", "outcomes", "layers", "ended")]
            depth = str(EXIT_POINTS[0])
            assert facts == ["reviews", 0.05, {"early": 1}, {depth: 1}, "stop"]
            assert line["answer"] == found[place].tokens[0][:32]
        if place in compared:
            assert (line["policy"], line["outcomes"]["shadow"]) == ("reviews", 1)
    assert sum(layers.values(), Counter()) == Counter(counted["exit_histogram"])
    assert counted["tokens_decided"] == sum(counted["exit_histogram"].values())
    for policy in counted["policies"].values():
        assert policy["layers_run"] + policy["layers_skipped"] == policy["layers_possible"]

    decided.clear()
    assert served(ours, ASKS) == stock
    assert not any(one.is_early for one in decided.values())
    ours.llm_engine.step()
    assert not scheduler_of(ours)._objects._probable
    assert not scheduler_of(ours)._objects._read
