from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny import tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer.artifact.fields import Choice, Label
from vllm_adainfer.artifact.files import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    POLICY_FILE,
    save_artifact,
)
from vllm_adainfer.cli import app

TEMPLATE = "Review : {text} Sentiment :"


def text(number: int) -> str:
    """Another one for each number, in words that the tokenizer knows."""
    return " ".join(("bad", "good")[int(digit)] for digit in f"{number:09b}")


class Place:
    """Good input for every command in one directory, to be spoilt by a test."""

    def __init__(self, directory: Path, model: Path, policy: Path) -> None:
        self.directory = directory
        self.model = model
        self.data = directory / "data.jsonl"
        self.output = directory / "policy"
        self.artifact = directory / "artifact"
        self.write_rows(300)
        shutil.copytree(policy, self.artifact)

    def write_rows(self, count: int, **last: Any) -> None:
        rows = [{"text": text(i), "label": ("bad", "good")[i % 2]} for i in range(count)]
        rows[-1].update(last)
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def calibrate(self, **options: str) -> list[str]:
        return self.command("calibrate", {"output": str(self.output), **options})

    def evaluate(self, **options: str) -> list[str]:
        return self.command("evaluate", {"artifact": str(self.artifact), **options})

    def command(self, name: str, options: dict[str, str]) -> list[str]:
        good = {"model": str(self.model), "data": str(self.data), "template": TEMPLATE}
        arguments = [name]
        for option, value in {**good, **options}.items():
            arguments += [f"--{option.replace('_', '-')}", value]
        return arguments

    def content(self) -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in self.directory.rglob("*")}


@pytest.fixture
def place(tmp_path, tiny_model, tiny_policy) -> Place:
    return Place(tmp_path, tiny_model, tiny_policy)


def promise(**options: str) -> Callable[[Place], list[str]]:
    return lambda place: place.calibrate(**{"labels": "bad,good", **options})


def missing_data(place: Place) -> list[str]:
    place.data.unlink()
    return place.calibrate()


def malformed_row(place: Place) -> list[str]:
    place.data.write_text(place.data.read_text() + '{"text": \n')
    return place.calibrate()


def row_that_is_no_object(place: Place) -> list[str]:
    place.data.write_text("[1]\n" + place.data.read_text())
    return place.calibrate()


def empty_data(place: Place) -> list[str]:
    place.data.write_text("\n")
    return place.calibrate()


def too_few_rows(place: Place) -> list[str]:
    place.write_rows(226)
    return place.calibrate(epsilon="0.02", delta="0.1")


def unknown_field(place: Place) -> list[str]:
    return place.calibrate(template="{review}")


def missing_template(place: Place) -> list[str]:
    return place.calibrate(template=f"@{place.directory / 'none.txt'}")


def long_prompt(place: Place) -> list[str]:
    place.write_rows(300, text="good " * 600)
    return place.calibrate()


def output_is_a_file(place: Place) -> list[str]:
    place.output.write_text("notes")
    return place.calibrate()


def output_below_a_file(place: Place) -> list[str]:
    return place.calibrate(output=str(place.data / "policy"))


def output_is_another_directory(place: Place) -> list[str]:
    place.output.mkdir()
    (place.output / "notes.txt").write_text("notes")
    return place.calibrate()


def missing_model_directory(place: Place) -> list[str]:
    return place.calibrate(model=str(place.directory / "no-model"))


def unknown_hub_id(place: Place) -> list[str]:
    return place.calibrate(model="nobody/nothing")


def unsupported_model(place: Place) -> list[str]:
    model = place.directory / "other-model"
    shutil.copytree(place.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForLM"]}))
    return place.calibrate(model=str(model))


def label_head_without_labels(place: Place) -> list[str]:
    return place.calibrate(probe="label-head")


def exit_points(asked: str) -> Callable[[Place], list[str]]:
    return lambda place: place.calibrate(exit_points=asked)


def probe(kind: str, **options: str) -> Callable[[Place], list[str]]:
    return lambda place: place.calibrate(probe=kind, **options)


def prompts_of_one_token(kind: str) -> Callable[[Place], list[str]]:
    def spoil(place: Place) -> list[str]:
        place.write_rows(300, text="good")  # one of them
        return place.calibrate(probe=kind, labels="bad,good", template="{text}")

    return spoil


def labels(names: str) -> Callable[[Place], list[str]]:
    return lambda place: place.calibrate(labels=names)


def unknown_label(place: Place) -> list[str]:
    place.write_rows(300, label="fine")
    return place.calibrate(labels="bad,good")


def accuracy_without_labels(place: Place) -> list[str]:
    place.write_rows(300, label=None)
    return place.calibrate(risk="accuracy", epsilon="0.1")


def accuracy_by_the_exact_bound(place: Place) -> list[str]:
    return place.calibrate(risk="accuracy", bound="exact")


def tolerance(**options: str) -> Callable[[Place], list[str]]:
    return lambda place: place.calibrate(**{"tolerance": "0.05", "labels": "bad,good", **options})


def student(**options: str) -> Callable[[Place], list[str]]:
    return lambda place: place.calibrate(**{"student": "minilm", "labels": "bad,good", **options})


def too_few_rows_for_accuracy(place: Place) -> list[str]:
    return place.calibrate(risk="accuracy", epsilon="0.01")


def classifier(**options: str) -> Callable[[Place], list[str]]:
    """The tiny model as a classifier of one column, on 100 rows, of which 113 would do."""
    changes = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}

    def spoil(place: Place) -> list[str]:
        place.write_rows(100, label="no")
        rows = [json.loads(line) | {"label": "no"} for line in place.data.read_text().splitlines()]
        place.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return place.calibrate(hf_overrides=json.dumps(changes), **options)

    return spoil


def overrides(text: str) -> Callable[[Place], list[str]]:
    return lambda place: place.calibrate(hf_overrides=text)


def damaged_details(place: Place) -> list[str]:
    (place.artifact / CALIBRATION_FILE).write_text("{")
    return ["inspect", str(place.artifact)]


def details_of_something_else(place: Place) -> list[str]:
    (place.artifact / CALIBRATION_FILE).write_text('{"rows": 3}')
    return ["inspect", str(place.artifact)]


def inspect_other_directory(place: Place) -> list[str]:
    return ["inspect", str(place.directory)]


def inspect_missing(place: Place) -> list[str]:
    return ["inspect", str(place.directory / "none")]


def inspect_unknown_hub_id(place: Place) -> list[str]:
    return ["inspect", "nobody/nothing"]


def inspect_broken_config(place: Place) -> list[str]:
    (place.artifact / CONFIG_FILE).write_text("{")
    return ["inspect", str(place.artifact)]


def corrupt_policy(place: Place) -> list[str]:
    path = place.artifact / POLICY_FILE
    path.write_bytes(path.read_bytes()[:-10])
    return place.evaluate()


def artifact_of_another_model(place: Place) -> list[str]:
    config = tiny_config(place.model, hidden_size=128)
    save_artifact(place.artifact, config, tiny_tensors(config), {}, "card\n")
    return place.evaluate()


def label_pool_of_rows(place: Place) -> list[str]:
    return place.calibrate(label_pool="letters")


def evaluate_another_epsilon(place: Place) -> list[str]:
    return place.evaluate(epsilon="0.03")


def evaluate_other_labels(place: Place) -> list[str]:
    return place.evaluate(labels="bad,Review")


def choices(text: str, **options: str) -> Callable[[Place], list[str]]:
    return lambda place: place.calibrate(choices=text, **options)


def evaluate_choices(**options: str) -> Callable[[Place], list[str]]:
    def spoil(place: Place) -> list[str]:
        texts = tuple(
            Choice(text=text, token_ids=(token,), first_tokens=(token,))
            for text, token in (("bad", 10), ("good", 20))
        )
        labels = tuple(Label(name=one.text, token_id=one.token_ids[0]) for one in texts)
        tiny_artifact(place.model, place.artifact, choices=texts, labels=labels)
        return place.evaluate(**options)

    return spoil


def evaluate_unknown_label(place: Place) -> list[str]:
    place.write_rows(3, label="fine")
    return place.evaluate()


def evaluate_missing_data(place: Place) -> list[str]:
    place.data.unlink()
    return place.evaluate(report=str(place.directory / "report.json"))


def report_is_a_directory(place: Place) -> list[str]:
    return place.evaluate(report=str(place.directory))


def no_prompts_without_a_page(place: Place) -> list[str]:
    return [*place.evaluate(), "--no-prompts"]


def page_is_a_directory(place: Place) -> list[str]:
    return place.evaluate(html=str(place.directory))


def page_below_a_file(place: Place) -> list[str]:
    return place.evaluate(html=str(place.data / "page.html"))


def requests(command: str, *lines: dict[str, Any], **options: str) -> Any:
    """Data of requests, and no template unless it is an option."""

    def spoil(place: Place) -> list[str]:
        full = [{"method": "POST", "custom_id": "1", **line} for line in lines]
        place.data.write_text("".join(json.dumps(line) + "\n" for line in full))
        arguments = getattr(place, command)(**options)
        if "template" not in options:
            at = arguments.index("--template")
            del arguments[at : at + 2]
        return arguments

    return spoil


def read_of(*label_ids: int) -> dict[str, Any]:
    body = {"prompt": "good", "max_tokens": 1, "logprob_token_ids": list(label_ids)}
    return {"url": "/v1/completions", "body": body}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            requests("calibrate", read_of(5, 6), template=TEMPLATE),
            "holds requests, which bring their prompts, labels and one token each: drop",
        ),
        (requests("calibrate", read_of(5, 6)), "too few rows for the bound"),
        (
            requests("calibrate", read_of(5, 6), read_of(5, 7)),
            "tokens found: --label-pool 5,6",
        ),
        (requests("calibrate", read_of(5, 6), {"text": "good"}), "line 2 is not a request"),
        (requests("calibrate", read_of(5)), "can exit: 1 x a request about fewer than two labels"),
        (
            requests("calibrate", read_of(5, 6), label_pool="5,7"),
            "(token 6), which --label-pool does not have: add it",
        ),
        (
            requests("calibrate", read_of(5, 6), label_pool="moods"),
            "--label-pool moods is not known",
        ),
        (classifier(), "too few rows for the bound"),
        (
            classifier(labels="bad,good"),
            "a classifier brings its labels, the columns of its scores",
        ),
        (classifier(choices="bad,good"), "the columns of its scores: drop --choices"),
        (classifier(max_tokens="4"), "a classifier answers with scores, not with tokens"),
        (classifier(probe="lens"), "exit points of a classifier have label-heads: drop --probe"),
        (classifier(chat_template="{{ x }}"), "the data hold none: drop it"),
        (classifier(gate="bad:0.5"), "--gate bad: there is no such label: name one of no, yes"),
        (overrides("{"), "--hf-overrides is not JSON"),
        (overrides("[1]"), "--hf-overrides must be a JSON object"),
        (lambda place: place.calibrate(chat_template="x"), "and this model generates: drop it"),
        (lambda place: place.evaluate(chat_template="x"), "is for a model that generates: drop"),
        (label_pool_of_rows, "--label-pool is for requests that name their own labels"),
        (
            requests("evaluate", read_of(5, 6)),
            "which this policy does not serve: calibrate",
        ),
        (
            evaluate_another_epsilon,
            "--epsilon 0.03 was not certified for this artifact: choose",
        ),
        (missing_data, "cannot read --data"),
        (malformed_row, "line 301 is not JSON"),
        (row_that_is_no_object, "line 1 must be a JSON object, not list"),
        (empty_data, "has no rows"),
        (too_few_rows, "too few rows for the bound: epsilon 0.02 at delta 0.1 needs at least"),
        (unknown_field, "line 1: the template needs the field 'review'"),
        (missing_template, "cannot read --template"),
        (long_prompt, "line 300: the prompt has"),
        (output_is_a_file, "exists and was not written by vllm-adainfer"),
        (output_below_a_file, "cannot write to"),
        (output_is_another_directory, "exists and was not written by vllm-adainfer"),
        (missing_model_directory, "neither a model directory nor a hub id"),
        (unknown_hub_id, "neither a model directory nor a hub id"),
        (unsupported_model, "has the architecture OtherForLM, which is not supported yet"),
        (label_head_without_labels, "--probe label-head needs --labels"),
        (exit_points("two"), "--exit-points must be auto or layers"),
        (exit_points("2,"), "--exit-points must be auto or layers"),
        (exit_points("3,6"), "--exit-points must ascend between 1 and 5"),
        (exit_points("3,2"), "--exit-points must ascend between 1 and 5"),
        (exit_points("3,3"), "--exit-points must ascend between 1 and 5"),
        (
            probe("label-head", labels="bad,good", exit_points="0,3"),
            "must ascend between 1 and 5 for this model of 6 layers and this probe, got 0,3",
        ),
        (
            probe("pooled-label-head", labels="bad,good", exit_points="0,6"),
            "--exit-points must ascend between 0 and 5",
        ),
        (probe("pooled-label-head"), "--probe pooled-label-head needs --labels, such as"),
        (probe("branch"), "--probe branch needs --labels, such as"),
        (probe("branch", max_tokens="4"), "--probe branch needs --labels, such as"),
        (
            probe("branch", labels="bad,good", max_tokens="4"),
            "--labels are one-token answers: drop --max-tokens or --labels",
        ),
        (
            prompts_of_one_token("pooled-label-head"),
            "a pooled-label-head leaves out the first token of a prompt, and this one has no other",
        ),
        (
            prompts_of_one_token("branch"),
            "a branch leaves out the first token of a prompt, and this one has no other: use",
        ),
        (labels("good"), "--labels needs at least two different names"),
        (labels("good,good"), "--labels needs at least two different names"),
        (labels("good,"), "--labels needs at least two different names"),
        (labels("good,good Review"), "'good' and 'good Review' both begin with"),
        (unknown_label, "line 300: the label 'fine' is not among bad, good"),
        (accuracy_without_labels, "line 300 has no label, but --risk accuracy needs"),
        (accuracy_by_the_exact_bound, "--bound exact counts changed answers and cannot bound"),
        (too_few_rows_for_accuracy, "too few rows for the bound: epsilon 0.01 at delta 0.1 needs"),
        (tolerance(labels=""), "--tolerance is for the probabilities of labels: give --labels"),
        (tolerance(max_tokens="8"), "--tolerance is for the probabilities of one token: drop"),
        (
            tolerance(max_tokens="8", labels=""),
            "--tolerance is for the probabilities of one token: drop --max-tokens or --tolerance",
        ),
        (tolerance(probe="lens"), "needs the scores of a label-head, and --probe lens has none"),
        (tolerance(probe="logit-lens"), "and --probe logit-lens has none: drop --probe or"),
        (tolerance(risk="accuracy"), "--tolerance bounds how far probabilities move, --risk accur"),
        (
            tolerance(epsilon="0.01"),
            "too few rows for the bound: epsilon 0.01 at delta 0.1 needs at least 459 rows",
        ),
        (
            promise(never_early="fine"),
            "--never-early fine: there is no such label: name one of",
        ),
        (promise(recall="fine:0.1"), "--recall fine: there is no such label: name one of bad"),
        (promise(precision="good"), "--precision 'good' must be a label and a share between"),
        (promise(recall="good:0.1", labels=""), "are about the labels of one-token answers: give"),
        (
            promise(never_early="good", labels="", max_tokens="8"),
            "are about the labels of one-token answers: give --labels",
        ),
        (promise(recall="good:0.1", risk="accuracy"), "compare with full depth, --risk accuracy"),
        (promise(gate="fine:0.5"), "--gate fine: there is no such label: name one of bad, good"),
        (promise(gate="good"), "--gate 'good' must be a label, or best, and a probability between"),
        (promise(gate="good:0.5", labels=""), "--gate is for the probabilities of labels: give"),
        (promise(gate="good:0.5", labels="", max_tokens="8"), "--gate is for the probabilities of"),
        (promise(gate="good:0.5", tolerance="0.1"), "drop all but one of --tolerance, --gate"),
        (promise(top="5:0.1"), "--top ranks the documents of a reranker, and this model generates"),
        (promise(top="5"), "--top '5' must be a number of documents and a margin"),
        (promise(top="0:0.1"), "--top '0:0.1' must be a number of documents and a margin"),
        (promise(top="5:0.1", risk="accuracy"), "--top bounds how often queries lose a document, "),
        (promise(gate="good:0.5", risk="accuracy"), "are on the wrong side, --risk accuracy the"),
        (promise(gate="good:0.5", probe="lens"), "--gate needs the scores of a label-head, and"),
        (
            choices("bad,good", gate="good:0.5"),
            "read probabilities run at full depth: drop --gate",
        ),
        (student(labels=""), "a --student needs --labels, such as --labels negative,positive"),
        (student(max_tokens="8", labels=""), "a --student scores labels, for one-token answers"),
        (student(probe="lens"), "a --student scores labels, for one-token answers: drop"),
        (student(classifier="crf"), "and a student is not asked about prompts without text: drop"),
        (student(student="no/such/encoder"), "--student no/such/encoder is neither a directory"),
        (student(student="."), "--student . is not an encoder that transformers loads from"),
        (damaged_details, "calibration.json cannot be read"),
        (details_of_something_else, "calibration.json does not hold rows, rows_held_out"),
        (inspect_other_directory, "has no config.json"),
        (inspect_missing, "has no config.json"),
        (inspect_unknown_hub_id, "neither a directory nor a hub id"),
        (inspect_broken_config, "config.json is not a valid artifact config"),
        (corrupt_policy, "policy.safetensors cannot be read"),
        (artifact_of_another_model, "hidden_size = 128, but the served model has hidden_size = 64"),
        (evaluate_other_labels, "--labels bad,Review are not those of the artifact: bad,good"),
        (choices("good"), "--choices needs at least two different texts"),
        (choices("good,good"), "--choices needs at least two different texts"),
        (choices("good,"), "--choices needs at least two different texts"),
        (choices("good, bad"), "--choices 'good, bad': some begin with a blank"),
        (choices("good,Review"), "line 1: the label 'bad' is not among good, Review"),
        (choices("good,excellent"), "the tokenizer does not give the choice 'excellent' back"),
        (choices("bad,good", labels="bad,good"), "--choices and --labels are two kinds"),
        (choices("bad,good", tolerance="0.1"), "that read probabilities run at full depth"),
        (evaluate_choices(labels="bad,good"), "the artifact is for choices, which it names itself"),
        (evaluate_choices(), "this model's tokenizer writes the choices with other tokens"),
        (evaluate_unknown_label, "line 3: the label 'fine' is not among bad, good"),
        (evaluate_missing_data, "cannot read --data"),
        (report_is_a_directory, "choose a file in a directory that is writable"),
        (no_prompts_without_a_page, "--no-prompts is about the page: give --html, too"),
        (page_is_a_directory, "choose a file in a directory that is writable"),
        (page_below_a_file, "choose a file in a directory that is writable"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(place, spoil, message):
    arguments = spoil(place)
    before = place.content()
    result = CliRunner().invoke(app, arguments)
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert result.stdout == ""
    assert result.exit_code == 1
    assert place.content() == before


@pytest.mark.parametrize("epsilon", ["0", "0.9", "some"])
def test_an_epsilon_out_of_range_is_a_usage_error(place, epsilon):
    before = place.content()
    result = CliRunner().invoke(app, place.calibrate(epsilon=epsilon))
    assert result.exit_code == 2
    assert "--epsilon" in result.stderr
    assert place.content() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
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
    result = CliRunner().invoke(app, place.calibrate(labels="bad,good", **{option: value}))
    assert result.exit_code == 2
    assert f"--{option}" in result.stderr
    assert place.content() == before


def test_waiting_threads_of_an_offline_command_sleep(monkeypatch):
    """Or two of them would spin for each other on a busy machine."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    monkeypatch.setattr(os, "environ", environment)
    CliRunner().invoke(app, ["inspect", "nowhere"])
    assert environment["OMP_WAIT_POLICY"] == "passive"
