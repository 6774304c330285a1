"""Which quoted results are older than the code that they are about, and how they are made again."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer

from benchmarks import parts, readme_table, run_parts
from benchmarks.parts import Manifest, Part, load_manifest, why_stale
from vllm_adainfer.errors import AdaInferError

ROOT = Path(__file__).parents[2]
MANIFEST = load_manifest()
PART = Part(name="speed", result="speed", about=("code",), commands=("true",), minutes=1)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Any:
    """A checkout with one file that a result is about and one that it is not; commits by a call."""
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    (tmp_path / "code").mkdir()
    parts.git("init", "-q")

    def commit(source: str) -> str:
        (tmp_path / "code/loop.py").write_text(source)
        (tmp_path / "page.md").write_text(source)
        parts.git("add", "-A")
        parts.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "change")
        parts._names_changed.cache_clear()
        return str(parts.git("rev-parse", "--short", "HEAD")).strip()

    yield commit
    parts._names_changed.cache_clear()


def of_commit(folder: Path, git: str | None) -> Path:
    """A folder with the result of `PART` at a commit."""
    folder.mkdir(exist_ok=True)
    (folder / "speed.json").write_text(json.dumps({"provenance": {"git": git}}))
    return folder


MANIFEST_OF_PART = Manifest(rooms={"code": ("code",)}, models=(), parts=(PART,))


@pytest.mark.parametrize(
    ("now", "stale"),
    [
        (
            '"""Other words."""\n\n\ndef f():\n    """Here, too."""\n    return 1  # and here\n',
            False,
        ),
        ("def f():\n    return 2\n", True),
    ],
    ids=["only words", "other code"],
)
def test_a_result_is_stale_once_the_code_that_it_is_about_does_something_else(
    repository, tmp_path, now, stale
):
    commit = repository('"""Words."""\n\n\ndef f():\n    """Words."""\n    return 1\n')
    results = of_commit(tmp_path / "results", commit)
    assert why_stale(PART, MANIFEST_OF_PART, results) is None
    repository(now)
    reason = why_stale(PART, MANIFEST_OF_PART, results)
    expected = f"was measured at {commit}, and code/loop.py has changed"
    assert reason == (expected if stale else None)


@pytest.mark.parametrize(
    ("git", "reason"),
    [
        (None, "names no commit"),
        ("abc-dirty", "was measured with changes to abc that no commit has"),
        ("0000000", "was measured at 0000000, which this clone does not have"),
    ],
)
def test_a_result_without_a_commit_that_anyone_has_is_stale(repository, tmp_path, git, reason):
    repository("a = 1\n")
    assert why_stale(PART, MANIFEST_OF_PART, of_commit(tmp_path / "results", git)) == reason


def test_a_release_fails_on_stale_results_and_a_check_warns(monkeypatch, capsys):
    monkeypatch.setattr(run_parts, "load_manifest", lambda: MANIFEST_OF_PART)
    monkeypatch.setattr(run_parts, "why_stale", lambda *_: "was never measured")
    run_parts.check(strict=False)
    assert capsys.readouterr().out.startswith("warning: 1 of 1 quoted results are older")
    with pytest.raises(typer.Exit):
        run_parts.check(strict=True)
    assert "\n  speed was never measured" in capsys.readouterr().err
    monkeypatch.setattr(run_parts, "why_stale", lambda *_: None)
    run_parts.check(strict=True)


def test_nothing_is_measured_of_code_that_no_commit_has(monkeypatch):
    monkeypatch.setattr(run_parts, "git", lambda *_: " M code/loop.py\n")
    with pytest.raises(AdaInferError, match="commit them"):
        run_parts.check_clean()


def test_a_part_runs_with_its_models_and_keeps_its_output(monkeypatch, tmp_path):
    monkeypatch.setattr(run_parts, "CACHE", tmp_path)
    model = parts.Model(name="tiny", command='mkdir -p "$MODELS/tiny" && echo made')
    part = PART.model_copy(update={"commands": ('ls "$MODELS/tiny" "$DATA" > "$OUTPUT"',)})
    manifest = Manifest(rooms={"code": ("code",)}, models=(model,), parts=(part,))
    assert run_parts.run_part(part, manifest, tmp_path)
    assert (tmp_path / "speed.json").is_file()
    assert (tmp_path / "speed.log").read_text() == "made\n"
    assert (tmp_path / "work").is_dir()
    failing = part.model_copy(update={"commands": ("exit 3",)})
    assert not run_parts.run_part(failing, manifest, tmp_path)


def test_a_part_that_was_cut_short_is_begun_again_and_its_result_is_not_kept(
    monkeypatch, tmp_path, capsys
):
    """Also if its file names today's commit: scripts write what they have, to go on from it."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(run_parts, "CACHE", tmp_path)
    monkeypatch.setattr(run_parts, "RESULTS", results)
    monkeypatch.setattr(run_parts, "load_manifest", lambda: MANIFEST_OF_PART)
    monkeypatch.setattr(run_parts, "why_stale", lambda *_: None)
    monkeypatch.setattr(run_parts.subprocess, "run", lambda *_, **__: None)  # writes the pages
    cut = PART.model_copy(update={"commands": ('touch "$OUTPUT"; false',)})
    assert not run_parts.run_part(cut, MANIFEST_OF_PART, tmp_path)
    assert run_parts.why_not_measured(cut, MANIFEST_OF_PART) == "was cut short"
    run_parts.keep()
    assert not [*results.iterdir()]
    assert "speed stays as it is: speed was cut short" in capsys.readouterr().out
    assert run_parts.run_part(
        cut.model_copy(update={"commands": ("true",)}), MANIFEST_OF_PART, tmp_path
    )
    assert run_parts.why_not_measured(cut, MANIFEST_OF_PART) is None
    run_parts.keep()
    assert [file.name for file in results.iterdir()] == ["speed.json"]


def test_a_part_that_takes_too_long_ends_with_all_that_it_has_started(monkeypatch, tmp_path):
    monkeypatch.setattr(run_parts, "CACHE", tmp_path)
    monkeypatch.setattr(run_parts, "LONGEST", 0.5)
    slow = PART.model_copy(
        update={"commands": ('(sleep 60; echo late) & echo $! > "$OUTPUT"; wait',)}
    )
    assert not run_parts.run_part(slow, MANIFEST_OF_PART, tmp_path)
    child = int((tmp_path / "speed.json").read_text())
    deadline = time.monotonic() + 30  # a kill is sent at once, and takes effect soon
    while is_running(child):
        assert time.monotonic() < deadline, f"process {child} goes on"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Whether a process has not ended; what nobody has collected yet (a zombie) has."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("part", MANIFEST.parts, ids=lambda part: part.name)
def test_a_part_names_scripts_models_and_code_that_exist(part):
    for path in MANIFEST.paths_of(part):
        assert (ROOT / path).exists(), path
    named = set(re.findall(r"\$MODELS/(\w+)", " ".join(part.commands)))
    assert named <= {model.name for model in MANIFEST.models}
    assert bool(part.by_hand) != any("$OUTPUT" in command for command in part.commands)


def test_every_result_that_a_page_quotes_has_a_part():
    writers = "front_page", "results_page", "results_summary", "results_speed", "results_tables"
    code = " ".join((ROOT / f"benchmarks/{name}.py").read_text() for name in writers)
    results = {file.stem for file in parts.RESULTS.glob("*.json")}
    quoted = {name for name in results if f'"{name}"' in code} | {*readme_table.QUOTED.values()}
    assert len(quoted) > 20
    assert quoted <= {part.result for part in MANIFEST.parts}
