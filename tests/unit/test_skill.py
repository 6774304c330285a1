"""What the skill for agents tells them to run and to read exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from vllm_adainfer.cli import app
from vllm_adainfer.frontend.series import register_series

ROOT = Path(__file__).parents[2]
SKILL = (ROOT / "skills" / "vllm-adainfer" / "SKILL.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands
LINES = SKILL.replace("\\\n", " ").splitlines()


def test_it_begins_with_its_name_and_when_to_use_it():
    said = yaml.safe_load(SKILL.split("---\n")[1])
    assert said["name"] == "vllm-adainfer"
    assert len(said["description"]) <= 1024


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("vllm-adainfer ")])
def test_each_command_has_the_options_that_it_is_given(line):
    _, name, *given = line.split()
    known = {option for one in COMMANDS[name].params for option in one.opts}
    asked = {word for word in given if word.startswith("--")}
    assert asked <= known | ({"--served-model-name"} if name == "serve" else set())


def test_what_it_reads_is_written():
    report = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    series = {
        family.name
        for metric in register_series((1,), choices=True, kinds=True, drafts=True).values()
        for family in metric.describe()
    }
    words = set(re.findall(r"`([^`\n]+)`", SKILL))
    assert {word for word in words if re.fullmatch(r"\w+_95", word)} <= report.keys()
    named = set(re.findall(r"adainfer:(\w+)", SKILL))
    assert all(any(one.startswith(f"adainfer:{name}") for one in series) for name in named)
    options = {word.split()[0] for word in words if word.startswith("--")}
    known = {option for one in COMMANDS["calibrate"].params for option in one.opts}
    assert options - {"--additional-config"} <= known
    for page in re.findall(r"`(docs/\w+\.md)`", SKILL):
        assert (ROOT / page).is_file(), page
