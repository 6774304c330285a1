"""What `vllm-adainfer kinds`, its page and `doctor --auto` say of a server's directory."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny import tiny_artifact, tiny_config, word_tokenizer
from vllm_adainfer.auto.directory import AutoDirectory, write_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import RECURS, KindTable, pools
from vllm_adainfer.auto.tries import Try
from vllm_adainfer.cli import app
from vllm_adainfer.offline.doctor import auto as checks
from vllm_adainfer.offline.doctor.auto import examine_auto
from vllm_adainfer.offline.reports.timeline import LISTED, MOST_POINTS
from vllm_adainfer.watch.ledger import Ledger

BAD = {"policy": 1, "why": "its files"}
MAY_3 = time.mktime((2026, 5, 3, 12, 0, 0, 0, 0, -1))
LABEL, CHOICE = Kind("label", (1, 2)), Kind("choice", choices=("\x1b[2J", "<script>", "yes"))
PROBABILITIES, LORA = Kind("probabilities", (1, 2)), Kind("label", (1, 2), adapter="mood")
REQUESTS = {LABEL: 4 * RECURS, CHOICE: 2 * RECURS, PROBABILITIES: RECURS, LORA: RECURS}
POOL = [Kind("label", (3, number)) for number in range(4, 4 + RECURS)]


class Served:
    """The directory of a server, and what processes write there."""

    def __init__(self, root: Path, tokenizer: Path) -> None:
        self.directory = AutoDirectory(root)
        self.directory.create()
        self.names = {kind: kind.name(self.directory.salt) for kind in REQUESTS}
        table = KindTable(self.directory.salt)
        table.since = MAY_3
        for kind, requests in REQUESTS.items():
            for number in range(requests):
                table.arrived(kind, 10 + number % 2, MAY_3).tokens += 10
                table.tokens += 10
        for kind in (None, *POOL):
            table.arrived(kind, 10, MAY_3).tokens += 10
            table.tokens += 10
        content = table.as_dict()
        content |= {"model": "served", "tokenizer": str(tokenizer)}
        content["pools"] = pools(table)
        write_json(self.directory.kinds, content)

    def write(self, kind: Kind, name: str, **content: Any) -> None:
        write_json(self.directory.root / self.names[kind] / name, content)

    def tried(self, kind: Kind, status: str, *outcomes: str) -> None:
        tries = [Try(number, "f", 60, 1, 1, said) for number, said in enumerate(outcomes, 1)]
        self.write(kind, "trainer.json", status=status, tries=[vars(one) for one in tries])

    def ran(self, *more: str) -> str:
        done = CliRunner().invoke(app, ["kinds", str(self.directory.root), *more])
        assert done.exit_code == 0, done.output
        return done.output

    def line_of(self, kind: Kind) -> str:
        [line] = [line for line in self.ran().splitlines() if line.startswith(self.names[kind])]
        return line

    def page(self) -> str:
        self.ran("--page")
        return self.directory.page.read_text()

    def findings(self) -> dict[str, str]:
        """State of each check of the directory, by its sentence."""
        return {one.sentence: one.state for one in examine_auto(str(self.directory.root))}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    found: Path = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer().save_pretrained(found)
    return found


@pytest.fixture
def served(tmp_path, tokenizer) -> Served:
    return Served(tmp_path / "DIR", tokenizer)


def test_each_kind_has_a_row_with_what_it_reads_and_its_share(served):
    assert re.split(r"  +", served.line_of(LABEL)) == [
        served.names[LABEL],
        """label: '!', '!",'""",
        "-",
        "watch only",
        "80",
        "10",
        "11",
        f"{80 / (8 * RECURS + 21):.1%}",
    ]
    assert "'mood'" in served.line_of(LORA)
    assert 'set "tolerance" in the switch' in served.line_of(PROBABILITIES)


def test_objects_are_told_by_their_fields_with_the_command_for_a_policy(served):
    assert "Objects" not in served.ran()
    content = json.loads(served.directory.kinds.read_text())
    kind = Kind("object", schema="d", paths=("mood", "\x1b[2J"))
    table = KindTable(served.directory.salt)
    for _ in range(RECURS):
        table.arrived(kind, 10, MAY_3).tokens += 10
    content["kinds"] |= table.as_dict()["kinds"]
    write_json(served.directory.kinds, content)
    name = kind.name(served.directory.salt)
    [line] = [line for line in served.ran().splitlines() if line.startswith(name)]
    assert r"object: 'mood', '\x1b[2J'" in line
    assert "objects get no policy by themselves yet" in line
    assert f"Objects ({name}): the server does not calibrate itself for them." in served.ran()
    assert "vllm-adainfer calibrate --model MODEL --data CAPTURED --schema" in served.ran()


def test_texts_of_clients_cannot_move_the_cursor(served):
    line = served.line_of(CHOICE)
    assert r"choice: '\x1b[2J', '<script>', 'yes'" in line
    assert "\x1b" not in line


def test_without_the_tokenizer_labels_are_token_ids(tmp_path):
    served = Served(tmp_path / "DIR", tmp_path / "nothing")
    assert "label: 1, 2 " in served.line_of(LABEL)


def test_the_rest_and_pool_candidates_are_told(served):
    output = served.ran()
    assert (
        "served got 181 requests since 3 May 2026. All others, such as free text, ran 11.6%"
        in output
    )
    assert "Pool candidate: 20 requests name 20 different sets of 21 labels" in output
    assert "long-run bound" not in output


@pytest.mark.parametrize(
    ("status", "outcomes", "ledger", "state"),
    [
        ("recording", [], {}, "recording, 0 tries to"),
        (
            "given up",
            ["no", "no bound holds"],
            {},
            "given up after 2 tries to certify a policy: no bound holds",
        ),
        ("certified", ["no", "certified"], {}, "policy 2 serves"),
        ("certified", ["certified"], {"closed": False}, "policy 1 serves"),
        ("certified", ["certified"], {"closed": True}, "closed"),
        (
            "certified",
            ["certified"],
            {"closed": True, "course": 2, "requests": 900, "begins_at": 4000},
            "recorded anew from request 4,000 on",
        ),
        ("recording", ["certified"], {}, "policy 1 serves, next try at 2,000 rows"),
        ("certified", ["no", "certified", "no"], {}, "policy 2 serves   "),
        ("certified", ["no", "certified"], {"course": 1}, "2 serves, next try at 1,000 rows"),
        (
            "certified",
            ["certified"],
            {"closed": True, "why_closed": "its budget is spent"},
            "closed: its budget is",
        ),
        (
            "certified",
            ["certified"],
            {"quarantined": {"policy": 1, "why": "its files"}},
            "policy 1 is quarantined: its files",
        ),
    ],
)
def test_a_kind_says_where_it_stands(served, status, outcomes, ledger, state):
    served.tried(LABEL, status, *outcomes)
    served.write(LABEL, "ledger.json", **ledger)
    assert state in served.line_of(LABEL)


def test_a_kind_that_has_no_place_waits_for_one_where_kinds_are_recorded(served):
    write_json(served.directory.identity, {})
    assert "waits until it comes more often" in served.line_of(LABEL)
    served.write(LABEL, "ledger.json", requests=30)
    assert "recording, next try at 1,000 rows" in served.line_of(LABEL)


def test_what_it_brought_is_told_by_the_table_and_the_doctor(served):
    name = served.names[LABEL]
    write_json(served.directory.identity, {"delta": 0.1, "tolerance": 0.1})
    ledger = Ledger(0.02, 0.1, 0.25)
    ledger.add(3000, 400, 2)
    for kind in (LABEL, CHOICE):
        served.write(kind, "ledger.json", **ledger.as_dict())
    served.tried(LABEL, "recording", "certified")
    served.directory.tell(name, "status", rows=1432, layers_saved=0.41)
    line = served.line_of(LABEL)
    assert "policy 1 serves, next try at 2,000 rows of 1,432 now" in line
    assert line.endswith(" 41.0%      25.0%")
    claim = (
        "Of all 6,000 requests of 2 kinds together, at most 40 (0.7%) were answered otherwise than "
        "at full depth (one claim with confidence 90%)."
    )
    for told in served.ran(), served.page(), "\n".join(served.findings()):
        assert claim in told
    assert any("layers saved 41.0%, compared 25.0%. Since" in one for one in served.findings())
    served.directory.lost.write_text("{")
    assert "no claim over all kinds together: a ledger was damaged" in served.ran()


def test_the_ledger_says_what_is_promised_and_what_is_not(served):
    served.write(LABEL, "ledger.json", requests=48120, changed_at_most=700.2, alpha=0.1)
    assert served.ran().endswith(
        f"Since 3 May 2026 this server got 48,120 requests of kind {served.names[LABEL]}; at most "
        "700 (1.5%) were answered otherwise than at full depth (confidence 90%, at every moment, "
        "for any traffic).\n\nThis is a long-run bound over all of them: it says nothing of a "
        "single hour, a subset of the requests, or accuracy.\n"
    )


@pytest.mark.parametrize("content", [None, "{", "3", '{"kinds": {"a": 3}}'])
def test_a_directory_without_counts_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "kinds.json").write_text(content)
    done = CliRunner().invoke(app, ["kinds", str(tmp_path)])
    assert done.exit_code == 1
    assert "has no counts of kinds: name the directory" in done.output


def charts(page: str) -> list[dict[str, Any]]:
    data = page.split('type="application/json">')[1].split("</script>")[0]
    found: list[dict[str, Any]] = json.loads(data)["panels"]
    return found


def test_the_page_draws_what_happened_to_each_kind(served):
    name = served.names[LABEL]
    for number in range(2000):
        at = {
            "requests": number,
            "rows": number // 4,
            "changed_at_most": 30,
            "allowed": number / 50,
        }
        served.directory.tell(name, "status", **at, layers_saved=0.3, rate=0.25)
    for event in ("recording", "tried", "certified", "serving", "opened"):
        served.directory.tell(name, event, rows=400)
    served.directory.tell(name, "closed", why="<b>")
    with served.directory.events.open("a") as events:
        events.write('{"time": 1\n3\n{"time": "x", "kind": 1, "event": 2}\n{"time": 1')
    page = served.page()
    assert "why &lt;b&gt;" in page
    titles = "Requests and rows recorded", "Budget of changed answers", "Layers saved, and share"
    assert all(
        one["title"].startswith(title) for one, title in zip(charts(page), titles, strict=True)
    )
    for chart in charts(page):
        *lines, events = chart["traces"]
        assert all(0 < len(one["x"]) <= MOST_POINTS + 1 for one in lines), "points are thinned"
        assert events["text"][-1] == "closed"
    assert charts(page)[0]["traces"][0]["y"][-1] == 1999
    assert stat.S_IMODE(served.directory.page.stat().st_mode) == 0o600


def test_of_many_events_the_latest_are_listed(served):
    for number in range(3 * LISTED):
        served.directory.tell(served.names[LABEL], "tried", number=number)
    listed = [int(number) for number in re.findall(r"<td>number (\d+)</td>", served.page())]
    assert listed == list(range(2 * LISTED, 3 * LISTED))


def test_a_directory_that_only_watches_is_in_order(served):
    found = served.findings()
    assert "FAIL" not in found.values()
    skipped = [sentence for sentence, state in found.items() if state == "skip"]
    assert [sentence.split(":")[1][:8] for sentence in skipped] == [" no trai", " the wei"]


def failing(served: Served) -> str:
    """The one check that fails."""
    [sentence] = [sentence for sentence, state in served.findings().items() if state == "FAIL"]
    return sentence


def test_a_file_that_others_may_read_fails(served):
    served.directory.kinds.chmod(0o644)
    assert f"other users may read {served.directory.kinds}" in failing(served)
    assert "chmod -R go= " in failing(served)


def test_a_full_disk_fails(served, monkeypatch):
    monkeypatch.setattr(checks, "FREE_BYTES", 1 << 60)
    assert "make room, below" in failing(served)


def test_what_the_rows_take_is_told(served):
    rows = served.directory.rows(served.names[LABEL])
    rows.mkdir(parents=True)
    with (rows / "000001.safetensors").open("wb") as file:
        file.truncate(30_000_000)
    assert any("recorded rows take 0.03 GB" in text for text in served.findings())


@pytest.mark.parametrize("runs", [True, False])
def test_a_trainer_runs_while_it_holds_its_lock(served, runs):
    lock = os.open(served.directory.root / "trainer.lock", os.O_CREAT | os.O_RDWR, 0o600)
    if runs:
        fcntl.flock(lock, fcntl.LOCK_EX)
        [said] = [text for text in served.findings() if "a trainer runs" in text]
        assert "last wrote 0 minutes ago" in said
    else:
        assert "vllm-adainfer autopilot" in failing(served)
    os.close(lock)


def test_rows_older_than_a_week_fail(served):
    rows = served.directory.rows(served.names[LABEL])
    rows.mkdir(parents=True, mode=0o700)
    for path in (rows.parent, rows):
        path.chmod(0o700)
    for name, days in (("1.safetensors", 8), ("2.safetensors", 6)):
        (rows / name).touch(0o600)
        os.utime(rows / name, (time.time() - days * 86400,) * 2)
    assert "1 files of rows are older than 7 days" in failing(served)


def test_a_policy_that_was_put_aside_fails(served):
    served.write(LABEL, "ledger.json", quarantined={"policy": 2, "why": "its files are damaged"})
    assert f"({served.names[LABEL]}: its files are damaged)" in failing(served)


@pytest.mark.parametrize("same", [True, False])
def test_policies_are_for_the_weights_that_are_served(served, tiny_model, same):
    name = served.names[LABEL]
    tiny_artifact(tiny_model, served.directory.policy(name, 1))
    for path in served.directory.root.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    served.tried(LABEL, "certified", "certified")
    fingerprint = tiny_config(tiny_model).weights_fingerprint
    write_json(served.directory.identity, {"fingerprint": fingerprint if same else "other"})
    if same:
        assert "FAIL" not in served.findings().values()
    else:
        assert f"the policies of {name} are for other weights" in failing(served)


def test_doctor_ends_with_1_if_the_directory_is_not_in_order(tmp_path, served):
    done = CliRunner().invoke(app, ["doctor", "--auto", str(tmp_path / "nothing")])
    assert done.exit_code == 1
    assert "has no counts of kinds" in done.output
    done = CliRunner().invoke(app, ["doctor", "--auto", str(served.directory.root)])
    assert json.dumps("181 requests to served, of 4 kinds")[1:-1] in done.output
