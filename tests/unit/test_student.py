"""A student answers from the text of a prompt, the same in calibration and in serving."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import Head, rows_to_compile_for
from tokenizers import decoders
from torch import Tensor
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel
from vllm import SamplingParams

from tests import student
from tests.tiny import tiny_artifact, tiny_config, tiny_tensors, word_tokenizer
from vllm_adainfer.artifact.artifact import Artifact, Encoder
from vllm_adainfer.artifact.fields import Choice, Label, LastToken, SharedTokens, Student
from vllm_adainfer.artifact.files import load_artifact, load_artifact_config
from vllm_adainfer.artifact.source import STUDENT_FILES, STUDENT_TOKENIZER, STUDENT_WEIGHTS
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.scheduler import prompt_texts
from vllm_adainfer.engine.scheduler.prompt_texts import texts_for_students
from vllm_adainfer.engine.worker.served_policies import check_replaces
from vllm_adainfer.engine.worker.warm_up import warm_up
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy import own_text, packing
from vllm_adainfer.policy.encoders import BATCH
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.own_text import (
    MOST_CHARACTERS,
    MOST_PROMPT_TOKENS,
    decoding_digest,
    text_reader,
)
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.text_encoders import BagEncoder, LayersEncoder, TextEncoder
from vllm_adainfer.promise.label_subsets import bits_of
from vllm_adainfer.settings.engine import Settings

CPU = torch.device("cpu")
WITH_STUDENT: dict[str, Any] = {"exit_points": (0, 3), **student.asked_with()}
AROUND = SharedTokens(start=(1, 2, 3), end=(4, 5))


def scores_by_hand(encoder: Any, text: tuple[int, ...], head: Head) -> Tensor:
    """The definition: the mean of the states of one text, and a linear map."""
    states = encoder(torch.tensor([text])).last_hidden_state[0]
    return head.weight @ states.mean(0) + head.bias


# What it reads of a prompt


def words(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(100, 1000, count).tolist()


def test_it_reads_the_own_part_of_a_prompt_up_to_its_limit():
    own = words(10)
    read = student.reader(student.described(AROUND), AROUND)
    assert read([1, 2, 3, *own, 4, 5]) == tuple(own)
    longer = words(200, seed=1)
    assert read([1, 2, 3, *longer, 4, 5]) == tuple(longer[: student.LONGEST])


@pytest.mark.parametrize(
    "prompt",
    [
        [7, 2, 3, *words(10), 4, 5],
        [1, 2, 3, *words(10), 4, 6],
        [1, 2, 8, *words(10), 7, 5],
        [1, 2, *words(10), 4, 5],
        words(10),
        [1, 2, 3, 4, 5],
        [1, 2, 3, 5],
        [],
    ],
    ids=["start", "end", "both", "part", "all", "no text", "overlap", "empty"],
)
def test_it_is_not_asked_what_it_cannot_see_is_another_question_or_nothing(prompt):
    """It reads neither template nor question, so these must be those that it was taught."""
    assert student.reader(student.described(AROUND), AROUND)(prompt) == ()


@pytest.mark.parametrize(
    ("text", "asked"),
    [("good food", True), ("good \N{REPLACEMENT CHARACTER} food", False), (" \n", False)],
)
def test_it_is_not_asked_about_bytes_that_are_no_text_or_about_blanks(text, asked):
    read = text_reader(
        lambda tokens: text, student.described(), SharedTokens(), student.tokenizer()
    )
    assert bool(read([1] * 9)) == asked


def test_what_a_prompt_costs_on_arrival_has_a_cap(monkeypatch):
    """So many of its tokens are decoded, and so many characters read; half a character is cut."""
    seen: list[int] = []

    def decode(tokens: Any) -> str:
        seen.append(len(tokens))
        return f"{'good ' * 100_000}\N{REPLACEMENT CHARACTER}"

    described = student.described()
    tokenizer = SimpleNamespace(
        no_padding=lambda: None,
        enable_truncation=lambda _: None,
        encode=lambda text: seen.append(len(text)) or SimpleNamespace(ids=[1]),
    )
    monkeypatch.setattr(own_text, "Tokenizer", SimpleNamespace(from_str=lambda _: tokenizer))
    reader = text_reader(decode, described, SharedTokens(), student.tokenizer())
    assert reader([1] * 1_000_000) == (1,)
    most = described.most_tokens
    assert seen == [MOST_PROMPT_TOKENS * most, MOST_CHARACTERS * most]


# What it makes of texts


def student_of(encoder: Encoder, labels: int = 2) -> Probe:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(labels, student.WIDTH, generator=generator)
    head = Head(weight, torch.randn(labels, generator=generator))
    built = TextEncoder.of(encoder, CPU)
    return Probe(head, token_ids=torch.arange(labels), encoder=built, fused=False)


def scores_of(probe: Probe, texts: Any, subsets: Tensor | None = None) -> Tensor:
    return probe.label_scores(torch.empty(0), subsets, texts=texts)


@pytest.mark.parametrize("count", [1, BATCH, 2 * BATCH + 3])
def test_each_text_is_scored_as_if_it_were_alone(count):
    generator = np.random.default_rng(count)
    texts = [tuple(words(int(n), seed=n)) for n in generator.integers(1, student.LONGEST, count)]
    model, own = student.bert(), student_of(student.encoder())
    scores = scores_of(own, texts)
    wanted = torch.stack([scores_by_hand(model, text, own.head) for text in texts])
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)


def test_texts_of_any_lengths_stand_side_by_side(monkeypatch):
    """In rows of several lengths, and as they are read in padded batches."""
    monkeypatch.setattr(packing, "SHORTEST_ROW", 4)
    lens = [*range(1, student.LONGEST + 1), 3, 3, 9, 1]
    texts = [words(length, seed=place) for place, length in enumerate(lens)]
    rows = [*packing.packed(texts, CPU)]
    assert sorted(np.concatenate([one.texts for one in rows]).tolist()) == [*range(len(lens))]
    assert [one.tokens.shape[1] for one in rows][-1] == 32, "24 and shorter ones"
    assert len(rows) > 1
    assert sum(one.tokens.numel() for one in rows) < 1.2 * sum(lens)
    encoder = LayersEncoder(student.bert())
    assert encoder.packs
    torch.testing.assert_close(encoder(texts), encoder._padded(texts), rtol=1e-4, atol=1e-4)


def roberta() -> RobertaModel:
    """An encoder that counts positions on from that of the padding."""
    torch.manual_seed(3)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=1000, num_hidden_layers=1, max_position_embeddings=64, pad_token_id=1, **size
    )
    config.initializer_range = 0.5
    return RobertaModel(config).eval()


def test_an_encoder_that_would_read_them_otherwise_is_given_padded_batches():
    model, texts = roberta(), [words(count, seed=count) for count in (3, 20, 7)]
    encoder = LayersEncoder(model)
    assert not encoder.packs
    wanted = torch.stack([model(torch.tensor([t])).last_hidden_state[0].mean(0) for t in texts])
    torch.testing.assert_close(encoder(texts), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
    ids=["neither", "avx512", "amx"],
)
def test_it_is_read_in_bfloat16_where_the_processor_multiplies_that(
    monkeypatch, capabilities, dtype
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    plain = student.encoder()
    half = {name: one.bfloat16() for name, one in plain.tensors.items()}
    served = TextEncoder.of(Encoder(plain.settings, half), CPU)
    assert {one.dtype for one in served.state_dict().values()} == {dtype}
    assert served([(101, 102)]).dtype == torch.float32


def test_the_first_layers_of_an_encoder_read_as_it_does_up_to_there():
    deep = BertModel(BertConfig(**{**student.bert().config.to_dict(), "num_hidden_layers": 4}))
    text = words(9)
    shorter = LayersEncoder.first_layers(deep.eval(), 2).eval()
    wanted = deep(torch.tensor([text]), output_hidden_states=True).hidden_states[2].mean(1)
    torch.testing.assert_close(shorter([text]), wanted, rtol=1e-4, atol=1e-4)
    kept = TextEncoder.of(Encoder(shorter.settings, shorter.tensors()), CPU)
    assert torch.equal(kept([text]), shorter([text]))


def bag() -> BagEncoder:
    torch.manual_seed(4)
    return BagEncoder(torch.randn(1000, 6), 8).eval()


def test_a_bag_reads_the_mean_of_its_tokens_in_any_order():
    encoder, texts = bag(), [(7, 8, 9), (9, 7, 8), (5,)]
    means = torch.stack([encoder.words.weight[list(text)].mean(0) for text in texts])
    wanted = torch.nn.functional.gelu(encoder.mlp(encoder.norm(means)))
    torch.testing.assert_close(encoder(texts), wanted)
    kept = TextEncoder.of(Encoder(encoder.settings, encoder.tensors()), CPU)
    assert isinstance(kept, BagEncoder)
    assert torch.equal(kept(texts), encoder(texts))


def test_a_bag_whose_tensors_do_not_fit_is_an_error():
    whole = bag().tensors()
    for wrong in (
        {},
        {**whole, "mlp.bias": torch.zeros(9)},
        {**whole, "words.weight": torch.zeros(1000, 7)},
        {**whole, "other": torch.zeros(1)},
    ):
        with pytest.raises(AdaInferError, match=r"the student cannot be built .* calibrate again"):
            TextEncoder.of(Encoder(bag().settings, wrong), CPU)


def test_labels_that_a_request_does_not_name_score_nothing():
    subsets = torch.tensor([[True, True, False], [False, True, True]])
    scores = scores_of(student_of(student.encoder(), 3), [(101, 102), (103,)], subsets)
    assert torch.equal(scores.isneginf(), ~subsets)


def test_an_encoder_that_transformers_cannot_build_is_an_error():
    plain = student.encoder()
    for wrong in (
        Encoder({**plain.settings, "model_type": "unheard-of"}, plain.tensors),
        Encoder({**plain.settings, "hidden_size": 32}, plain.tensors),
        Encoder({**plain.settings, "vocab_size": 10**12}, plain.tensors),
        Encoder({**plain.settings, "num_hidden_layers": 10**9}, plain.tensors),
        Encoder({**plain.settings, "num_hidden_layers": None}, plain.tensors),
        Encoder({"hidden_size": 16}, plain.tensors),
        Encoder(plain.settings, {}),
    ):
        with pytest.raises(AdaInferError, match=r"the student cannot be built .* calibrate again"):
            TextEncoder.of(wrong, CPU)


# The policies that have one

POOL = tuple(Label(name=str(token), token_id=token) for token in (40, 7, 300))
CHOICES = tuple(
    Choice(text=name, token_ids=(token,), first_tokens=(token,))
    for name, token in (("yes", 21), ("no", 22))
)
POLICIES: dict[str, dict[str, Any]] = {
    "labels": {},
    "pooled": {"probe": "pooled-label-head", "pooled_from": 2},
    "pool": {"labels": POOL, "label_pool": True},
    "choices": {
        "choices": CHOICES,
        "labels": tuple(Label(name=c.text, token_id=c.token_ids[0]) for c in CHOICES),
    },
    "probabilities": {"risk": "probability", "tolerance": 0.05, "label_mass": True},
}


@pytest.fixture(params=[*POLICIES])
def artifact(request, tiny_model) -> Artifact:
    config = tiny_config(tiny_model, **{**WITH_STUDENT, **POLICIES[request.param]})
    tensors = tiny_tensors(config)
    return Artifact(config, tensors, encoder=student.encoder())


def test_a_policy_decides_before_the_first_layer_by_the_text(artifact):
    config = artifact.config
    policy = Policy(artifact, CPU)
    texts = [(101, 102, 103), (700, 150)]
    bits = bits_of(frozenset(config.label_ids), config.label_ids)
    rows = UndecidedRows(
        torch.empty(0, config.hidden_size),
        torch.tensor([0, 1]),
        subsets=torch.full((2,), bits),
        texts=texts,
    )
    decision, view = policy.decide(0, rows), policy.view(0, rows)
    assert decision.settled.shape == (2,)
    own = Head(*(artifact.tensors[f"exit.0.head_{name}"] for name in ("weight", "bias")))
    model = student.bert()
    wanted = torch.stack([scores_by_hand(model, text, own) for text in texts])
    labels = wanted[:, : len(config.label_ids)]
    assert view.tokens.tolist() == policy.answer_ids[labels.argmax(1)].tolist()
    best = labels.softmax(1).max(1).values
    torch.testing.assert_close(view.top_prob, best, rtol=1e-4, atol=1e-4)
    answered = decision.answers.values[:, : len(config.label_ids)].argmax(1)
    assert torch.equal(answered, labels.argmax(1))
    assert torch.equal(decision.settled, view.odds >= view.threshold)


def test_it_is_warmed_up(artifact, monkeypatch):
    asked: list[int] = []
    read = TextEncoder.read

    def noting(self: Any, hidden: Any, lens: Any, texts: Any) -> Tensor:
        asked.append(len(texts))
        return read(self, hidden, lens, texts)

    monkeypatch.setattr(TextEncoder, "read", noting)
    policies = PolicySet({"a": Policy(artifact, CPU)})
    warm_up(policies, torch.zeros(3, artifact.config.hidden_size))
    assert asked == list(rows_to_compile_for(3))


# The artifact


@pytest.fixture
def saved(tiny_model, tmp_path) -> Path:
    return tiny_artifact(tiny_model, tmp_path / "policy", **WITH_STUDENT)


def test_an_artifact_keeps_its_student(saved):
    loaded = load_artifact(str(saved))
    assert loaded.config.student == student.described()
    assert loaded.encoder is not None
    before, after = (
        scores_of(student_of(one), [(101, 102)]) for one in (student.encoder(), loaded.encoder)
    )
    assert torch.equal(before, after)
    assert loaded.digest != load_artifact(str(saved)).digest[::-1]


def test_both_parts_share_one_encoder(tiny_model):
    last = LastToken(exit_points=(0, 3), levels=tiny_config(tiny_model).levels)
    pooled = {"probe": "pooled-label-head", "pooled_from": 2, "last_token": last}
    config = tiny_config(tiny_model, **WITH_STUDENT, **pooled)
    parts = Artifact(config, tiny_tensors(config), encoder=student.encoder()).parts("a")
    own, other = (Policy(part, CPU) for part in parts.values())
    pair = zip(*(p.probes[0].encoder.state_dict().values() for p in (own, other)), strict=True)
    assert all(one.data_ptr() == two.data_ptr() for one, two in pair)
    without = config.model_copy(
        update={"last_token": last.model_copy(update={"exit_points": (3,)})}
    )
    assert without.parts("a")["a:last-token"].student is None


@pytest.mark.parametrize("name", STUDENT_FILES)
def test_a_file_that_is_missing_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(AdaInferError, match=f"has no {name}: give the directory"):
        load_artifact_config(str(saved))


def test_another_tokenizer_is_refused(saved):
    other = json.loads(student.tokenizer()) | {"normalizer": {"type": "Lowercase"}}
    (saved / STUDENT_TOKENIZER).write_text(json.dumps(other))
    with pytest.raises(AdaInferError, match="not the tokenizer that the student was trained with"):
        load_artifact_config(str(saved))


def test_other_weights_are_another_artifact(saved):
    before = load_artifact(str(saved)).digest
    content = bytearray((saved / STUDENT_WEIGHTS).read_bytes())
    content[-1] ^= 1
    (saved / STUDENT_WEIGHTS).write_bytes(bytes(content))
    assert load_artifact(str(saved)).digest != before


def test_damaged_weights_are_an_error(saved):
    (saved / STUDENT_WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(AdaInferError, match=r"student/model.safetensors cannot be read"):
        load_artifact(str(saved))


# On arrival


def arrival(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: Any,
    described: Student = WITH_STUDENT["student"],
    tokenizer: Any = None,
) -> Any:
    policy = {**WITH_STUDENT, "student": described}
    path = tiny_artifact(tiny_model, tmp_path / "reviews", **policy)
    switch = Settings.model_validate({"artifact": {"reviews": str(path)}})
    admission = Admission(switch)
    served = tokenizer or word_tokenizer()
    monkeypatch.setattr(prompt_texts, "cached_tokenizer_from_config", lambda _: served)
    texts = texts_for_students(SimpleNamespace(model_config=None), switch, admission)
    config = admission.policies.configs["reviews"]
    return admission, texts, config


def arrived(prompt: list[int] | None, **changes: Any) -> Any:
    plain = {
        "prompt_token_ids": prompt,
        "mm_features": [],
        "prompt_embeds": None,
        "lora_request": None,
    }
    return SimpleNamespace(**{**plain, **changes})


def params(config: Any, **changes: Any) -> SamplingParams:
    wanted = {"temperature": 0, "max_tokens": 1, "allowed_token_ids": list(config.label_ids)}
    return SamplingParams(**{**wanted, **changes})


@pytest.mark.parametrize(
    ("changes", "request_changes", "asked"),
    [
        ({}, {}, True),
        ({"allowed_token_ids": [1, 2]}, {}, False),
        ({"extra_args": {"adainfer": 0}}, {}, False),
        ({"extra_args": {"adainfer_epsilon": 0}}, {}, False),
        ({}, {"prompt_token_ids": None}, False),
        ({}, {"mm_features": ["an image"]}, False),
        ({}, {"prompt_embeds": torch.zeros(2, 2)}, False),
    ],
    ids=["ours", "other labels", "opted out", "never", "no tokens", "image", "embeddings"],
)
def test_the_text_is_read_once_if_a_policy_may_ask_the_student(
    tiny_model, tmp_path, monkeypatch, changes, request_changes, asked
):
    admission, texts, config = arrival(tiny_model, tmp_path, monkeypatch)
    prompt = [1, 2, *words(5)]
    resolved = admission.arrival.resolve("id", params(config, **changes))
    found = texts(arrived(prompt, **request_changes), resolved)
    assert found == ({"reviews": tuple(prompt[2:])} if asked else {})


def lower_case() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Replace("A", "a")
    return tokenizer


@pytest.mark.parametrize(
    ("kept", "served", "refused"),
    [
        (decoding_digest(word_tokenizer()), word_tokenizer(), False),
        (decoding_digest(word_tokenizer()), lower_case(), True),
        (None, lower_case(), False),  # by a version that did not keep it
    ],
    ids=["the same", "another", "unknown"],
)
def test_it_reads_what_the_tokenizer_of_the_calibration_decodes(
    tiny_model, tmp_path, monkeypatch, kept, served, refused
):
    described = student.described(decoding=kept)
    said = "policy reviews: this engine's tokenizer decodes prompts into other texts than"
    with pytest.raises(AdaInferError, match=said) if refused else nullcontext():
        arrival(tiny_model, tmp_path, monkeypatch, described, served)


def test_a_worker_gets_the_text_of_the_policy_that_decides(tiny_model, tmp_path, monkeypatch):
    from dataclasses import replace

    admission, _, config = arrival(tiny_model, tmp_path, monkeypatch)
    resolved = replace(
        admission.arrival.resolve("id", params(config)), texts={"reviews": (5, 6), "other": (7,)}
    )
    assert admission.admit(resolved, words(9)).text == (5, 6)
    undecided = replace(resolved, output=None)
    assert admission.admit(undecided, words(9)).text == ()


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [
        (student.asked_with(), student.asked_with(), False),
        (
            student.asked_with(),
            {**student.asked_with(), "student": student.described(revision="abc")},
            False,
        ),
        (student.asked_with(), student.asked_with(SharedTokens(start=(1,))), True),
        (student.asked_with(), student.asked_with(SharedTokens(start=(1, 3))), True),
        (student.asked_with(), student.asked_with(most_tokens=9), True),
        (
            student.asked_with(),
            {**student.asked_with(), "student": student.described(decoding="0123")},
            True,
        ),
        ({}, student.asked_with(), True),
        (student.asked_with(), {}, False),
    ],
    ids=[
        "same",
        "other weights",
        "shorter",
        "other start",
        "other limit",
        "other texts",
        "new",
        "gone",
    ],
)
def test_a_reload_brings_only_students_that_read_alike(
    tiny_model, old: dict[str, Any], new: dict[str, Any], refused: bool
):
    configs = [
        tiny_config(tiny_model, exit_points=(0, 3) if one else (3,), **one) for one in (new, old)
    ]
    if not refused:
        check_replaces("reviews", *configs)
        return
    with pytest.raises(AdaInferError, match=r"policy reviews differs .* in how its student reads"):
        check_replaces("reviews", *configs)
