"""The suite's command checks what it is given before any engine starts."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.suite.run_suite import app


@pytest.fixture
def folder(tmp_path):
    """A data directory whose SST-2 has too few rows to calibrate on."""
    (tmp_path / "sst2").mkdir()
    rows = [{"text": "good", "label": ("negative", "positive")[i % 2]} for i in range(100)]
    for part in ("train", "test"):
        path = tmp_path / "sst2" / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "sst2,sst5"}, "there is no task 'sst5' in this suite; it has sst2, "),
        ({"tasks": "cr"}, "has no file cr/train.jsonl, which the task cr needs"),
        ({"output": "."}, "choose a file in a directory that is writable"),
        ({"tasks": "sst2", "shots": "0"}, "the training part of sst2 has 100: give more"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(folder, tiny_model, options, message):
    output = folder / "suite.json"
    given = {"model": str(tiny_model), "data-dir": str(folder), "output": str(output), **options}
    done = CliRunner().invoke(app, [part for k, v in given.items() for part in (f"--{k}", v)])
    assert done.exit_code == 1
    [line] = done.stderr.strip().splitlines()
    assert message in line
    assert not output.exists()
