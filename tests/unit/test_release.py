"""A release is what was tested, with the notes of its changes; hosted CI calls what exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.release import main, released

ROOT = Path(__file__).parents[2]
CHANGELOG = """# Changelog

## [Unreleased]

### Added

- A thing.

## [0.1.0] - 2026-11-30

- The first.
"""


def test_what_was_unreleased_becomes_a_section_and_the_notes():
    text, notes = released(CHANGELOG, "0.2.0", "2026-12-01")
    assert notes == "### Added\n\n- A thing.\n"
    assert text.split("## ")[1:] == [
        "[Unreleased]\n\n",
        "[0.2.0] - 2026-12-01\n\n#",
        "Added\n\n- A thing.\n\n",
        "[0.1.0] - 2026-11-30\n\n- The first.\n",
    ]


def test_nothing_is_released_twice_or_without_a_change():
    with pytest.raises(SystemExit, match=r"has a section for 0\.1\.0: raise the version"):
        released(CHANGELOG, "0.1.0", "2026-12-01")
    text, _ = released(CHANGELOG, "0.2.0", "2026-12-01")
    with pytest.raises(SystemExit, match="says nothing below"):
        released(text, "0.3.0", "2026-12-01")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / ".gitignore").write_text("dist\n")
    for command in (
        "init -q",
        "config user.name x",
        "config user.email x@localhost",
        "add .",
        "commit -qm x",
    ):
        subprocess.run(["git", *command.split()], check=True)
    (tmp_path / "dist").mkdir()
    return tmp_path


def test_a_release_is_a_commit_a_tag_and_notes(checkout, capsys):
    with pytest.raises(SystemExit, match=r"dist has no wheel of 0\.2\.0: run make dist"):
        main(checkout, "0.2.0")
    (checkout / "dist" / "vllm_adainfer-0.2.0-py3-none-any.whl").touch()
    (checkout / "CHANGELOG.md").write_text(CHANGELOG.replace("A thing", "Another"))
    with pytest.raises(SystemExit, match="not committed"):
        main(checkout, "0.2.0")
    subprocess.run(["git", "checkout", "-q", "."], check=True)
    main(checkout, "0.2.0")
    show = ["git", "show", "--format=%s", "v0.2.0:CHANGELOG.md"]
    assert "## [0.2.0] - " in subprocess.run(show, capture_output=True, text=True).stdout
    assert (checkout / "dist" / "NOTES.md").read_text() == "### Added\n\n- A thing.\n"
    assert "twine upload dist/vllm_adainfer-0.2.0*" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"a tag v0\.2\.0 already"):
        main(checkout, "0.2.0")


def workflow_of_hosted_ci() -> dict[str, Any]:
    jobs: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    return jobs


def commands_of(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_hosted_ci_runs_all_that_ci_runs_here_and_all_cases():
    [here] = re.findall(r"set -- (.+)", (ROOT / ".ci" / "run").read_text())
    job = workflow_of_hosted_ci()["run"]
    tests, *others = job["strategy"]["matrix"]["target"]
    assert tests == "test CASES="
    assert shlex.split(here) == ["test CASES='not full or $half'", *others]
    assert commands_of(job)[-1] == '.ci/run "${{ matrix.target }}"'


@pytest.mark.parametrize(("commit", "half"), [("4e0a", "even"), ("4e07", "odd")])
def test_ci_here_runs_the_half_of_the_full_cases_that_the_commit_names(commit, half, tmp_path):
    programs = {"make": 'printf "%s\\n" "$@"', "git": f"echo {commit}", "chromium": ":"}
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci" / "run"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[:2] == ["test", f"CASES=not full or {half}"]


def test_ci_says_last_what_it_could_not_test(tmp_path):
    """Without Chromium, root or a network, the rest is tested all the same."""
    for name in ("apt-get", "make"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n[ {name} = make ]\n')
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    done = subprocess.run(
        [ROOT / ".ci" / "run", "docs"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made, _, last = done.stdout.splitlines()[-3:]
    assert made == "make docs"
    assert last.startswith("NOT TESTED: the HTML pages")


def test_ci_calls_targets_that_exist():
    scripts = [ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml"]
    text = "\n".join(script.read_text() for script in scripts)
    found = re.findall(r"set -- (.+)|run: make (\S+)", text)
    makefile = (ROOT / "Makefile").read_text()
    targets = [target for commands in found for target in shlex.split(" ".join(commands))]
    assert "docs" in targets
    for target in targets:
        name, *settings = shlex.split(target)
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), target
        for setting in settings:
            assert re.search(rf"^{setting.partition('=')[0]} :=", makefile, re.MULTILINE), target


def test_hosted_ci_skips_nothing_for_want_of_a_browser():
    assert any("command -v chromium" in one for one in commands_of(workflow_of_hosted_ci()["run"]))


def test_the_nightly_run_needs_an_index_that_is_set():
    job = workflow_of_hosted_ci()["nightly"]
    assert "vars.VLLM_NIGHTLY_INDEX != ''" in job["if"]
