"""What a line of the audit says, and how lines are summed up."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from tests.running import vllm_request
from vllm_adainfer.cli import app
from vllm_adainfer.engine.scheduler.audit import LONGEST_ANSWER, Trail, line_of
from vllm_adainfer.exits.accounting.report import Outcome, Provenance
from vllm_adainfer.settings.engine import NO_POLICY

DIGEST = "0123456789abcdef"


def token(policy: str, layers: int, outcome: Outcome) -> Provenance:
    served = policy != NO_POLICY
    return Provenance(
        "id", policy, DIGEST if served else "", 0.02 if served else None, layers, outcome
    )


def ended(tokens: int, status: RequestStatus, **changes: Any) -> Request:
    params = SamplingParams(temperature=0, max_tokens=100)
    request = vllm_request(**{"name": "cmpl-7-0-0123abcd", "params": params, **changes})
    request.append_output_token_ids(list(range(tokens)))
    request.status = status
    return request


def line(
    *tokens: Provenance, status: RequestStatus = RequestStatus.FINISHED_STOPPED, **changes: Any
) -> dict[str, Any]:
    trail = Trail()
    for one in tokens:
        trail.add(one)
    request = ended(len(tokens), status, **changes)
    return line_of(request, trail, 30, str(request.get_finished_reason()), 12.34567)


def test_a_line_says_where_an_answer_came_from():
    assert line(token("mood", 16, "early")) == {
        "time": 12.346,
        "request": "cmpl-7-0",
        "policy": "mood",
        "artifact": DIGEST,
        "epsilon": 0.02,
        "outcomes": {"early": 1},
        "layers": {"16": 1},
        "depth": 30,
        "answer": [0],
        "ended": "stop",
    }


def test_tokens_that_no_policy_decides_do_not_hide_the_policy_of_others():
    found = line(token("mood", 16, "early"), token(NO_POLICY, 30, "full_depth"))
    assert (found["policy"], found["epsilon"]) == ("mood", 0.02)
    assert found["outcomes"] == {"early": 1, "full_depth": 1}
    assert found["layers"] == {"16": 1, "30": 1}
    alone = line(token(NO_POLICY, 30, "full_depth"))
    assert (alone["policy"], alone["artifact"], alone["epsilon"]) == (None, None, None)


def test_a_request_whose_client_hung_up_has_no_answer():
    found = line(status=RequestStatus.FINISHED_ABORTED)
    assert (found["outcomes"], found["answer"], found["ended"]) == ({}, [], "abort")


def test_what_a_client_sends_or_a_model_writes_is_quoted_up_to_a_limit():
    found = line(
        *[token(NO_POLICY, 30, "full_depth")] * 100,
        name="x" * 5000,
        trace_headers={"traceparent": "00-" + "f" * 5000, "other": "y"},
    )
    assert found["answer"] == list(range(LONGEST_ANSWER))
    assert found["layers"] == {"30": 100}
    assert (len(found["request"]), len(found["traceparent"])) == (256, 64)


def test_the_scores_of_a_classifier_are_its_answer():
    trail = Trail(scores=[0.25, 0.75])
    trail.add(token("mood", 16, "early"))
    request = ended(0, RequestStatus.FINISHED_STOPPED)
    assert line_of(request, trail, 30, "stop", 0)["answer"] == [0.25, 0.75]


def test_a_line_says_why_tokens_ran_to_full_depth_that_their_policy_serves():
    tokens = [token("mood", 15, "early"), token("mood", 30, "full_depth")]
    assert "why_full_depth" not in line(*tokens)
    tokens += [replace(tokens[1], why_full_depth=why) for why in ("keys_needed", "beyond_bound")]
    assert line(*tokens)["why_full_depth"] == {"keys_needed": 1, "beyond_bound": 1}


@pytest.fixture
def summed(tmp_path):
    def summed(*lines: dict[str, Any], cut: str = "") -> str:
        text = "".join(json.dumps(one) + "\n" for one in lines) + cut
        (tmp_path / "audit-0-000001.jsonl").write_text(text)
        done = CliRunner().invoke(app, ["audit", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.output

    return summed


def test_lines_are_summed_up_by_policy_and_bound(summed):
    rows = summed(
        line(token("mood", 15, "early")),
        line(token("mood", 30, "full_depth")),
        line(token("mood", 30, "shadow")),
        line(token(NO_POLICY, 30, "full_depth")),
        line(replace(token(NO_POLICY, 30, "full_depth"), not_covered="other_prompt")),
        line(status=RequestStatus.FINISHED_ABORTED),
        {"lost": 4},
        cut='{"time": 1',  # the server is writing it
    ).splitlines()
    assert [row.split() for row in rows[2:4]] == [
        ["full_depth", "-", "-", "2", "0", "2", "0", "0.0%"],
        ["mood", DIGEST[:12], "0.02", "3", "1", "1", "1", "16.7%"],
    ]
    assert rows[-3:] == [
        "1 requests ended without an answer (abort)",
        "1 requests for a policy's output ran at full depth, because their prompts lack the tokens "
        "that all prompts of its calibration share",
        "4 lines were lost: they came faster than the disk took them",
    ]


def test_what_is_no_audit_is_refused_with_its_place(tmp_path):
    file = tmp_path / "audit-0-000001.jsonl"
    file.write_text('{"lost": 1}\n{"outcomes": 3}\n')
    done = CliRunner().invoke(app, ["audit", str(file)])
    assert done.exit_code == 1
    assert "line 2 is not a line of an audit" in done.output
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "nothing")])
    assert "cannot read" in done.output
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "empty")])
    assert "has no files audit-*.jsonl" in done.output
