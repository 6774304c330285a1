"""Calibrate, inspect and evaluate through the command line, on the tiny model."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters import save_adapter
from tests.byte_model import save_byte_model
from tests.e2e.commands import command
from tests.e2e.oracle import hidden_states
from tests.full import needed
from tests.tiny import LAYERS

TEMPLATE = "Review: {text} Sentiment:"
ROUNDING = 1e-3  # what the engine's rounding may move a probability by
REPORT_KEYS = {
    "model", "artifact", "n", "epsilon", "delta", "layers_total", "stock", "adainfer", "speedup",
    "layers_saved", "disagreement", "efficiency", "provenance",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    lines = (
        files("vllm_adainfer.offline.demo").joinpath("calibration.jsonl").read_text().splitlines()
    )
    path.write_text("\n".join(lines[:240]))
    return path


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An artifact by the CLI; a loose bound, as a random model agrees with itself late."""
    output = tmp_path_factory.mktemp("artifact") / "policy"
    done = command(
        "calibrate", "--model", str(tiny_model), "--data", str(rows), "--template", TEMPLATE,
        "--labels", "bad,good", "--epsilon", "0.2", "--output", str(output),
        "--probe", "label-head",  # "auto" takes the faster heads, which depends on the load
        "--dtype", "float32",  # vLLM's choice is bfloat16
    )  # fmt: skip
    return output, done


def changed_by_level(html: Path) -> dict[int, int]:
    """How many prompts a page shows as changed; each with what the policy saw of it."""
    page = html.read_text()
    rows = re.findall(r'<tr data-level="(\d+)"', page)
    assert page.count('<table class="views">') == len(rows)
    return dict(Counter(map(int, rows)))


def disagreeing_by_level(report: dict[str, Any]) -> dict[int, int]:
    """How many prompts changed between the passes of a report; a page shows at most 100."""
    name = "disagreement_between_passes"
    counts = (round(level[name] * report["n"]) for level in report["levels"])
    return {level: min(count, 100) for level, count in enumerate(counts) if count}


def test_calibrate_writes_the_artifact_and_says_what_it_promises(calibrated):
    output, done = calibrated
    names = {path.name for path in output.iterdir()}
    assert names == {
        "config.json", "policy.safetensors", "calibration.json", "README.md"
    }  # fmt: skip
    assert "epsilon 0.2 at delta 0.1" in done.stdout
    assert list(output.parent.iterdir()) == [output]  # no draft is left
    page = output.parent / "page.html"
    assert command("inspect", str(output), "--html", str(page)).stdout.strip() in done.stdout
    assert 'id="level"' in page.read_text()
    page.unlink()


def test_explain_shows_what_the_probe_sees_after_each_exit_point(calibrated, tiny_model):
    output, _ = calibrated
    text = "A warm and clever film"
    done = command(
        "explain", text, "--model", str(tiny_model), "--artifact", str(output),
        "--template", TEMPLATE, "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(tiny_model).encode(TEMPLATE.format(text=text))
    states = hidden_states(model, prompt)
    heads = load_file(output / "policy.safetensors")
    *views, full = found["views"]
    for view in views:
        weight, bias = (heads[f"exit.{view['layer']}.head_{name}"] for name in ("weight", "bias"))
        [best, second] = (
            (weight @ states[view["layer"]][-1] + bias).softmax(0).sort().values.flip(0)
        )
        assert view["top_prob"] == pytest.approx(float(best), abs=ROUNDING)
        assert view["gap"] == pytest.approx(float(best - second), abs=ROUNDING)
        assert view["settled"] == (view["score"] >= view["threshold"])
    settled = [view["layer"] for view in views if view["settled"]]
    assert found["leaves_after"] == min([*settled, LAYERS])
    assert full["layer"] == LAYERS
    assert found["prompt_tokens"] == len(prompt)


def test_evaluate_reports_what_the_contract_names_and_counts_the_work_skipped(
    calibrated, tiny_model, rows, tmp_path
):
    output, _ = calibrated
    report_file, html = tmp_path / "report.json", tmp_path / "report.html"
    done = command(
        "evaluate", "--model", str(tiny_model), "--artifact", str(output), "--data", str(rows),
        "--template", TEMPLATE, "--repeat", "1", "--report", str(report_file), "--html", str(html),
    )  # fmt: skip
    report = json.loads(report_file.read_text())
    assert changed_by_level(html) == disagreeing_by_level(report)
    assert report.keys() >= REPORT_KEYS
    assert done.stdout.strip().splitlines()[-1].startswith("speedup ")
    histogram = {int(layer): share for layer, share in report["adainfer"]["exit_histogram"].items()}
    assert sum(histogram.values()) == pytest.approx(1)
    assert report["n"] == 240
    assert (report["layers_saved"] > 0) == (min(histogram) < LAYERS)
    # Apart from ties, the batches of this model round alike: both comparisons find the same.
    assert report["rounding"] < 0.03
    for level in report["levels"]:
        between = level["disagreement_between_passes"]
        assert level["disagreement"] == pytest.approx(between, abs=0.03)
    assert any(level["disagreement"] > 0 for level in report["levels"])


@pytest.mark.parametrize("compiled", needed(1, of=[False, True]), ids=["traced", "compiled"])
def test_a_policy_for_generated_text_is_calibrated_and_evaluated_per_token(
    tiny_model, rows, tmp_path, compiled
):
    output, report_file = tmp_path / "policy", tmp_path / "report.json"
    done = command(
        "calibrate", "--model", str(tiny_model), "--data", str(rows), "--template", TEMPLATE,
        "--max-tokens", "5", "--epsilon", "0.3", "--exit-points", "4", "--output", str(output),
        compiled=compiled,
    )  # fmt: skip
    assert "1200 tokens of 240 prompts" in done.stdout
    config = json.loads((output / "config.json").read_text())
    assert config["output"] == {"kind": "tokens", "candidates": "shortlist"}
    assert (config["max_tokens"], config["bound"]) == (5, "wsr")
    command(
        "evaluate", "--model", str(tiny_model), "--artifact", str(output), "--data", str(rows),
        "--template", TEMPLATE, "--repeat", "1", "--report", str(report_file),
        compiled=compiled,
    )  # fmt: skip
    report = json.loads(report_file.read_text())
    assert report.keys() >= REPORT_KEYS
    assert report["max_tokens"] == 5
    assert report["texts"]["never_exit"]["same"] == 1
    assert report["texts"]["stock"]["same"] > 0.8  # segments round bfloat16 elsewhere
    assert report["texts"]["stock"]["read_back"]["disagreement"] < 0.05
    ours = report["texts"]["adainfer"]
    assert ours["read_back"]["perplexity"] >= 1
    assert 0 < report["disagreement_between_passes"] == ours["disagreement"] < 0.3
    assert 0 < report["disagreement"] < 0.3
    assert min(map(int, report["adainfer"]["exit_histogram"])) == 4


@pytest.fixture(scope="module")
def pool(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Requests of two questions about the same films, and a policy for both by the CLI."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    names = "bad", "good", "negative", "positive"
    bad, good, negative, positive = tokenizer.convert_tokens_to_ids(names)
    lines = []
    reviews = files("vllm_adainfer.offline.demo").joinpath("calibration.jsonl").read_text()
    for number, review in enumerate(reviews.splitlines()[:160]):
        text = json.loads(review)["text"]
        for name, own in ("mood", [bad, good]), ("side", [negative, positive, good]):
            body = {"prompt": f"{text}\n\n{name} :", "max_tokens": 1, "temperature": 0}
            key = ("allowed_token_ids", "logprob_token_ids")[number % 2]
            request = {"custom_id": f"{number}", "method": "POST", "url": "/v1/completions"}
            lines.append({**request, "body": {**body, key: own}, "label": own[0]})
    lines.append({"custom_id": "0", "url": "/v1/embeddings", "body": {"input": "a film"}})
    folder = tmp_path_factory.mktemp("pool")
    data, output = folder / "rows.jsonl", folder / "policy"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command(
        "calibrate", "--model", str(tiny_model), "--data", str(data), "--exit-points", "3,5",
        "--label-pool", ",".join(map(str, (bad, good, negative, positive))), "--epsilon", "0.3",
        "--output", str(output),
    )  # fmt: skip
    return data, output, done


def test_a_label_pool_is_calibrated_on_requests(pool):
    _, output, done = pool
    assert "1 of 321 lines were left out: /v1/embeddings" in done.stderr
    assert "two or more of bad, good, negative, positive" in done.stdout
    assert "mood :" in done.stdout
    assert json.loads((output / "config.json").read_text())["output"]["kind"] == "label-pool"


@pytest.mark.full
def test_a_label_pool_is_evaluated_on_requests(pool, tiny_model, tmp_path):
    data, output, _ = pool
    report_file, html = tmp_path / "report.json", tmp_path / "report.html"
    command(
        "evaluate", "--model", str(tiny_model), "--artifact", str(output), "--data", str(data),
        "--repeat", "1", "--epsilon", "0.3", "--report", str(report_file),
        "--html", str(html),
    )  # fmt: skip
    report = json.loads(report_file.read_text())
    assert changed_by_level(html) == disagreeing_by_level(report)
    assert report["n"] == 320
    assert report["layers_saved"] > 0
    assert 0 <= report["disagreement"] < 0.3
    assert report["disagreement"] == pytest.approx(report["disagreement_between_passes"], abs=0.03)
    assert [level["epsilon"] for level in report["levels"]] == [0.3]


@pytest.mark.full
def test_choices_are_calibrated_inspected_evaluated_and_examined(rows, tmp_path):
    model, output = save_byte_model(tmp_path / "model"), tmp_path / "policy"
    report_file, html = tmp_path / "report.json", tmp_path / "report.html"
    asked = "--model", str(model), "--data", str(rows), "--template", "{text} "
    done = command(
        "calibrate", *asked, "--label-field", "", "--choices", "yes,no", "--epsilon", "0.3",
        "--exit-points", "2,4", "--output", str(output),
    )  # fmt: skip
    assert "requests for a choice among 'yes', 'no'" in done.stdout
    assert command("inspect", str(output)).stdout.strip() in done.stdout
    command(
        "evaluate", *asked, "--label-field", "", "--artifact", str(output), "--repeat", "1",
        "--report", str(report_file), "--html", str(html),
    )  # fmt: skip
    report = json.loads(report_file.read_text())
    assert changed_by_level(html) == disagreeing_by_level(report)
    assert report["n"] == 240
    assert report["never_exit"]["disagreement_with_stock"] == 0
    assert 0 < report["layers_saved"] < 1
    said = command("doctor", "--model", str(model), "--artifact", str(output)).stdout
    assert 'full depth: 6 of 6 requests with "adainfer": 0 ran all' in said


@pytest.mark.full
def test_a_policy_for_an_adapter_is_calibrated_inspected_evaluated_and_examined(
    tiny_model, reference, rows, tmp_path
):
    adapter = save_adapter(reference, tmp_path / "adapter", seed=1)
    output, report_file = tmp_path / "policy", tmp_path / "report.json"
    lora = "--lora", f"mood={adapter}"
    asked = "--model", str(tiny_model), "--data", str(rows), "--template", TEMPLATE
    texts = "--max-tokens", "3", "--exit-points", "4", "--epsilon", "0.3"
    done = command("calibrate", *asked, *lora, *texts, "--output", str(output))
    assert re.search(r"adapter +mood \(LoRA, fingerprint ", done.stdout)
    measured = "--artifact", str(output), "--repeat", "1", "--report", str(report_file)
    command("evaluate", *asked, *lora, *measured)
    report = json.loads(report_file.read_text())
    assert report["texts"]["stock"]["same"] == 1, "eager, so that segments round as stock does"
    assert "read_back" not in report["texts"]["adainfer"], "that ends vLLM's engine with adapters"
    assert 0 < report["layers_saved"] < 1
    done = command("evaluate", *asked, *measured, expect=1)
    assert "was calibrated with a LoRA adapter: give --lora mood=DIR" in done.stderr
    examined = "doctor", "--model", str(tiny_model), "--artifact", str(output)
    assert 'full depth: 6 of 6 requests with "adainfer": 0' in command(*examined, *lora).stdout
    assert "give --lora mood=DIR" in command(*examined, expect=1).stdout


def test_an_artifact_for_other_weights_is_refused_in_one_sentence(
    calibrated, tiny_model, rows, tmp_path
):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, _ = calibrated
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    done = command(
        "evaluate", "--model", str(tmp_path / "other"), "--artifact", str(output),
        "--data", str(rows), "--template", TEMPLATE, "--report", str(tmp_path / "report.json"),
        expect=1,
    )  # fmt: skip
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "calibrated for other weights" in line
    assert not (tmp_path / "report.json").exists()
