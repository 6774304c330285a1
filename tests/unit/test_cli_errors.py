from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny import tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer.artifact.fields import Choice, Label
from vllm_adainfer.artifact.files import POLICY_FILE, save_artifact
from vllm_adainfer.cli import app

TEMPLATE = "Review : {text} Sentiment :"
WITHOUT_DATA = ("inspect",)


def text(number: int) -> str:
    """Another one for each number, in words that the tokenizer knows."""
    return " ".join(("bad", "good")[int(digit)] for digit in f"{number:09b}")


class Place:
    """Good input for every command in one directory, to be spoilt by a test."""

    def __init__(self, directory: Path, model: Path, policy: Path) -> None:
        self.directory = directory
        self.model = model
        self.data = directory / "data.jsonl"
        self.artifact = directory / "artifact"
        self.template: str | None = TEMPLATE
        self.write_rows(300)
        shutil.copytree(policy, self.artifact)

    def write_rows(
        self, count: int, labels: tuple[str, str] = ("bad", "good"), **last: Any
    ) -> None:
        """So many rows, the last one with these fields."""
        rows = [{"text": text(i), "label": labels[i % 2]} for i in range(count)]
        rows[-1].update(last)
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, command: str) -> list[str]:
        """Those of `command`, with good values for what it leaves out; HERE is the directory."""
        name, *given = shlex.split(command.replace("HERE", str(self.directory)))
        good = {"--model": str(self.model), "--data": str(self.data), "--template": self.template}
        if name == "calibrate":
            good["--output"] = str(self.directory / "policy")
        elif name == "evaluate":
            good["--artifact"] = str(self.artifact)
        if name in WITHOUT_DATA:
            return [name, *given]
        for option, value in good.items():
            if option not in given and value is not None:
                given += [option, value]
        return [name, *given]

    def content(self) -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in self.directory.rglob("*")}


@pytest.fixture
def place(tmp_path, tiny_model, tiny_policy) -> Place:
    return Place(tmp_path, tiny_model, tiny_policy)


Spoil = Callable[[Place], Any]


def rows(count: int = 300, **changes: Any) -> Spoil:
    return lambda place: place.write_rows(count, **changes)


def file(name: str, content: str) -> Spoil:
    """A file of the directory has other content."""

    def spoil(place: Place) -> None:
        path = place.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)

    return spoil


def no_data(place: Place) -> None:
    place.data.unlink()


def half_a_row(place: Place) -> None:
    place.data.write_text(place.data.read_text() + '{"text": \n')


def other_model(place: Place) -> None:
    model = place.directory / "other-model"
    shutil.copytree(place.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForLM"]}))


def cut_short(place: Place) -> None:
    path = place.artifact / POLICY_FILE
    path.write_bytes(path.read_bytes()[:-10])


def for_another_model(place: Place) -> None:
    config = tiny_config(place.model, hidden_size=128)
    save_artifact(place.artifact, config, tiny_tensors(config), {}, "card\n")


def for_choices(place: Place) -> None:
    """They have other tokens than the tokenizer gives them."""
    texts = tuple(
        Choice(text=text, token_ids=(token,), first_tokens=(token,))
        for text, token in (("bad", 10), ("good", 20))
    )
    labels = tuple(Label(name=one.text, token_id=one.token_ids[0]) for one in texts)
    tiny_artifact(place.model, place.artifact, choices=texts, labels=labels)


def requests(*lines: dict[str, Any]) -> Spoil:
    """Data of requests, which need no template."""

    def spoil(place: Place) -> None:
        full = [{"method": "POST", "custom_id": "1", **line} for line in lines]
        place.data.write_text("".join(json.dumps(line) + "\n" for line in full))
        place.template = None

    return spoil


def read_of(*label_ids: int) -> dict[str, Any]:
    body = {"prompt": "good", "max_tokens": 1, "logprob_token_ids": list(label_ids)}
    return {"url": "/v1/completions", "body": body}


# The tiny model as a classifier of one column.
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
AS_CLASSIFIER = f"calibrate --hf-overrides '{json.dumps(CLASSIFIER)}'"
ONE_TOKEN = rows(text="good")  # the prompt of the last row, without a template
LABELS = "calibrate --labels bad,good"
TOLERANCE = f"{LABELS} --tolerance 0.05"
STUDENT = f"{LABELS} --student minilm"


def sentence_of(place: Place, command: str) -> str:
    """What a command says that fails; it leaves everything as it was."""
    before = place.content()
    result = CliRunner().invoke(app, place.arguments(command))
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert (result.stdout, result.exit_code) == ("", 1)
    assert place.content() == before
    return line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("calibrate --hf-overrides {", "--hf-overrides is not JSON"),
        ("calibrate --hf-overrides [1]", "--hf-overrides must be a JSON object"),
        ("calibrate --chat-template x", "and this model generates: drop it"),
        ("evaluate --chat-template x", "is for a model that generates: drop"),
        (
            "calibrate --label-pool letters",
            "--label-pool is for requests that name their own labels",
        ),
        ("evaluate --epsilon 0.03", "--epsilon 0.03 was not certified for this artifact: choose"),
        ("calibrate --template {review}", "line 1: the template needs the field 'review'"),
        ("calibrate --template @HERE/none.txt", "cannot read --template"),
        ("calibrate --output HERE/data.jsonl/policy", "cannot write to"),
        ("calibrate --model HERE/no-model", "neither a model directory nor a hub id"),
        ("calibrate --model nobody/nothing", "neither a model directory nor a hub id"),
        ("calibrate --probe label-head", "--probe label-head needs --labels"),
        ("calibrate --exit-points two", "--exit-points must be auto or layers"),
        ("calibrate --exit-points 3,6", "--exit-points must ascend between 1 and 5"),
        ("calibrate --exit-points 3,2", "--exit-points must ascend between 1 and 5"),
        (
            "calibrate --probe pooled-label-head",
            "--probe pooled-label-head needs --labels, such as",
        ),
        ("calibrate --probe branch", "--probe branch needs --labels, such as"),
        ("calibrate --labels good", "--labels needs at least two different names"),
        ("calibrate --labels 'good,good Review'", "'good' and 'good Review' both begin with"),
        (
            "calibrate --risk accuracy --bound exact",
            "--bound exact counts changed answers and cannot bound",
        ),
        (
            "calibrate --risk accuracy --epsilon 0.01",
            "too few rows for the bound: epsilon 0.01 at delta 0.1 needs",
        ),
        (
            "calibrate --tolerance 0.05 --labels ''",
            "--tolerance is for the probabilities of labels: give --labels",
        ),
        (f"{TOLERANCE} --max-tokens 8", "--tolerance is for the probabilities of one token: drop"),
        (
            f"{TOLERANCE} --probe lens",
            "needs the scores of a label-head, and --probe lens has none",
        ),
        (f"{TOLERANCE} --probe logit-lens", "and --probe logit-lens has none: drop --probe or"),
        (
            f"{TOLERANCE} --risk accuracy",
            "--risk accuracy bounds the accuracy lost, --tolerance bounds how far",
        ),
        (
            f"{TOLERANCE} --epsilon 0.01",
            "too few rows for the bound: epsilon 0.01 at delta 0.1 needs at least 459 rows",
        ),
        ("calibrate --recall good:0.1", "are about the labels of one-token answers: give"),
        (
            "calibrate --never-early good --max-tokens 8",
            "are about the labels of one-token answers: give --labels",
        ),
        ("calibrate --gate good:0.5", "--gate is for the probabilities of labels: give"),
        (
            "calibrate --choices bad,good --gate good:0.5",
            "read probabilities run at full depth: drop --gate",
        ),
        (
            "calibrate --student minilm",
            "a --student needs --labels, such as --labels negative,positive",
        ),
        (
            "calibrate --student minilm --max-tokens 8",
            "a --student scores labels, for one-token answers",
        ),
        (f"{STUDENT} --probe lens", "a --student scores labels, for one-token answers: drop"),
        (
            f"{STUDENT} --classifier crf",
            "and a student is not asked about prompts without text: drop",
        ),
        ("inspect HERE", "has no config.json"),
        ("inspect nobody/nothing", "neither a directory nor a hub id"),
        (
            "evaluate --labels bad,Review",
            "--labels bad,Review are not those of the artifact: bad,good",
        ),
        ("calibrate --choices good", "--choices needs at least two different texts"),
        ("calibrate --choices 'good, bad'", "--choices 'good, bad': some begin with a blank"),
        ("calibrate --choices good,Review", "line 1: the label 'bad' is not among good, Review"),
        (
            "calibrate --choices good,excellent",
            "the tokenizer does not give the choice 'excellent' back",
        ),
        ("calibrate --choices bad,good --max-tokens 4", "drop --max-tokens"),
        ("calibrate --choices bad,good --probe lens", "drop --probe lens"),
        (
            "calibrate --choices bad,good --tolerance 0.1",
            "that read probabilities run at full depth",
        ),
        ("evaluate --report HERE", "choose a file in a directory that is writable"),
        ("evaluate --no-prompts", "--no-prompts is about the page: give --html, too"),
        ("evaluate --html HERE", "choose a file in a directory that is writable"),
        ("evaluate --html HERE/data.jsonl/page.html", "choose a file in a directory that is"),
    ],
)
def test_an_option_that_does_not_fit_is_one_sentence_and_leaves_nothing_behind(
    place, command, message
):
    assert message in sentence_of(place, command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--probe label-head --exit-points 0,3",
            "must ascend between 1 and 5 for this model of 6 layers and this probe, got 0,3",
        ),
        (
            "--probe pooled-label-head --exit-points 0,6",
            "--exit-points must ascend between 0 and 5",
        ),
        (
            "--probe branch --max-tokens 4",
            "--labels are one-token answers: drop --max-tokens or --labels",
        ),
        ("--never-early fine", "--never-early fine: there is no such label: name one of"),
        ("--recall fine:0.1", "--recall fine: there is no such label: name one of bad"),
        ("--precision good", "--precision 'good' must be a label and a share between"),
        ("--recall good:0.1 --risk accuracy", "compare with full depth, --risk accuracy"),
        ("--gate fine:0.5", "--gate fine: there is no such label: name one of bad, good"),
        ("--gate good", "--gate 'good' must be a label, or best, and a probability between"),
        ("--gate good:0.5 --tolerance 0.1", "drop all but one of --tolerance, --gate"),
        ("--top 5:0.1", "--top ranks the documents of a reranker, and this model generates"),
        ("--top 0:0.1", "--top '0:0.1' must be a number of documents and a margin"),
        ("--top 5", "--top '5' must be a number of documents and a margin"),
        ("--top 5:0.1 --risk accuracy", "--top bounds how often queries lose a document, "),
        ("--gate good:0.5 --risk accuracy", "are on the wrong side, and a policy has one"),
        ("--gate good:0.5 --probe lens", "--gate needs the scores of a label-head, and"),
        ("--student no/such/encoder", "--student no/such/encoder is neither a directory"),
        ("--student .", "--student . is not an encoder that transformers loads from"),
        ("--choices bad,good", "--choices and --labels are two kinds"),
    ],
)
def test_an_option_that_does_not_go_with_labels_is_one_sentence(place, options, message):
    assert message in sentence_of(place, f"{LABELS} {options}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "too few rows for the bound"),
        ("--labels bad,good", "a classifier brings its labels, the columns of its scores"),
        ("--choices bad,good", "the columns of its scores: drop --choices"),
        ("--max-tokens 4", "a classifier answers with scores, not with tokens"),
        ("--probe lens", "exit points of a classifier have label-heads: drop --probe"),
        ("--chat-template '{{ x }}'", "the data hold none: drop it"),
        ("--gate bad:0.5", "--gate bad: there is no such label: name one of no, yes"),
    ],
)
def test_an_option_that_does_not_go_with_a_classifier_is_one_sentence(place, options, message):
    place.write_rows(100, labels=("no", "no"))  # of which 113 would do
    assert message in sentence_of(place, f"{AS_CLASSIFIER} {options}")


@pytest.mark.parametrize(
    ("spoil", "command", "message"),
    [
        (
            requests(read_of(5, 6)),
            f"calibrate --template '{TEMPLATE}'",
            "holds requests, which bring their prompts, labels and one token each: drop",
        ),
        (requests(read_of(5, 6)), "calibrate", "too few rows for the bound"),
        (requests(read_of(5, 6), read_of(5, 7)), "calibrate", "tokens found: --label-pool 5,6"),
        (requests(read_of(5, 6), {"text": "good"}), "calibrate", "line 2 is not a request"),
        (requests(read_of(5)), "calibrate", "can exit: 1 x a request about fewer than two labels"),
        (
            requests(read_of(5, 6)),
            "calibrate --label-pool 5,7",
            "(token 6), which --label-pool does not have: add it",
        ),
        (
            requests(read_of(5, 6)),
            "calibrate --label-pool moods",
            "--label-pool moods is not known",
        ),
        (requests(read_of(5, 6)), "evaluate", "which this policy does not serve: calibrate"),
        (
            requests(read_of(5, 6)),
            "calibrate --choices bad,good --label-pool letters",
            "--choices and --label-pool are two kinds",
        ),
        (no_data, "calibrate", "cannot read --data"),
        (no_data, "evaluate --report HERE/report.json", "cannot read --data"),
        (half_a_row, "calibrate", "line 301 is not JSON"),
        (file("data.jsonl", "[1]\n"), "calibrate", "line 1 must be a JSON object, not list"),
        (file("data.jsonl", "\n"), "calibrate", "has no rows"),
        (
            rows(226),
            "calibrate --epsilon 0.02 --delta 0.1",
            "too few rows for the bound: epsilon 0.02 at delta 0.1 needs at least",
        ),
        (rows(text="good " * 600), "calibrate", "line 300: the prompt has"),
        (rows(label="fine"), LABELS, "line 300: the label 'fine' is not among bad, good"),
        (
            rows(label=None),
            "calibrate --risk accuracy --epsilon 0.1",
            "line 300 has no label, but --risk accuracy needs",
        ),
        (rows(3, label="fine"), "evaluate", "line 3: the label 'fine' is not among bad, good"),
        (
            ONE_TOKEN,
            f"{LABELS} --probe pooled-label-head --template {{text}}",
            "a pooled-label-head leaves out the first token of a prompt, and this one has no other",
        ),
        (
            ONE_TOKEN,
            f"{LABELS} --probe branch --template {{text}}",
            "a branch leaves out the first token of a prompt, and this one has no other: use",
        ),
        (file("policy", "notes"), "calibrate", "exists and was not written by vllm-adainfer"),
        (
            file("policy/notes.txt", "notes"),
            "calibrate",
            "exists and was not written by vllm-adainfer",
        ),
        (
            other_model,
            "calibrate --model HERE/other-model",
            "has the architecture OtherForLM, which is not supported yet",
        ),
        (
            file("artifact/calibration.json", "{"),
            "inspect HERE/artifact",
            "calibration.json cannot be read",
        ),
        (
            file("artifact/calibration.json", '{"rows": 3}'),
            "inspect HERE/artifact",
            "calibration.json does not hold rows, rows_held_out",
        ),
        (
            file("artifact/config.json", "{"),
            "inspect HERE/artifact",
            "config.json is not a valid artifact config",
        ),
        (cut_short, "evaluate", "policy.safetensors cannot be read"),
        (
            for_another_model,
            "evaluate",
            "hidden_size = 128, but the served model has hidden_size = 64",
        ),
        (
            for_choices,
            "evaluate --labels bad,good",
            "the artifact is for choices, which it names itself",
        ),
        (for_choices, "evaluate", "this model's tokenizer writes the choices with other tokens"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(place, spoil, command, message):
    spoil(place)
    assert message in sentence_of(place, command)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epsilon", "0"),
        ("epsilon", "0.9"),
        ("epsilon", "some"),
        ("tolerance", "0"),
        ("tolerance", "0.6"),
        ("tolerance", "nan"),
        ("risk", "probability"),
        ("classifier", "rbf"),
        ("classifier", "boosting"),
        ("bound", "naive"),
        ("bound", "hoeffding-bentkus"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_a_usage_error(place, option, value):
    before = place.content()
    result = CliRunner().invoke(app, place.arguments(f"{LABELS} --{option} {value}"))
    assert result.exit_code == 2
    assert f"--{option}" in result.stderr
    assert place.content() == before


def test_waiting_threads_of_an_offline_command_sleep(monkeypatch):
    """Or two of them would spin for each other on a busy machine."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    monkeypatch.setattr(os, "environ", environment)
    CliRunner().invoke(app, ["inspect", "nowhere"])
    assert environment["OMP_WAIT_POLICY"] == "passive"
