"""Tiny checkpoints and artifacts, made here: nothing is downloaded."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from vllm_adainfer.artifact.branch_shapes import BRANCH_WIDTH
from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.fields import Label, Level
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.artifact.fingerprints import WeightsFingerprint
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.artifact.version_1 import tagged
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.promise.kinds import PROMISES

LAYERS = 6
EXIT_POINTS = (2, 3, 5)
FROM_ZERO = (0, 3, 5)  # the first one before all layers
LABELS = ("bad", "good")


def tiny_llama(directory: Path, hidden_size: int = 64) -> Path:
    """A random Llama whose hidden states differ clearly from layer to layer; two heads."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=1.6 / hidden_size**0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def word_tokenizer() -> Fast:
    """One token a word of the demo's reviews."""
    text = files("vllm_adainfer.offline.demo").joinpath("calibration.jsonl").read_text()
    split = pre_tokenizers.Whitespace()
    words = ["<unk>", *sorted({word for word, _ in split.pre_tokenize_str(text)})[:998]]
    more = (*LABELS, "negative", "positive", "Review", "Sentiment", ":")
    words += [word for word in more if word not in words]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>")
    )
    tokenizer.pre_tokenizer = split
    return Fast(tokenizer_object=tokenizer, unk_token="<unk>")


def served_fingerprint(model: Path, dtype: str = "float32") -> str:
    """What the plugin computes of the checkpoint when it is served in `dtype`."""
    fingerprint = WeightsFingerprint(getattr(torch, dtype))
    for file in model.glob("*.safetensors"):
        list(fingerprint.passing(load_file(file).items()))
    return fingerprint.hexdigest


def tiny_config(model: Path, **changes: Any) -> ArtifactConfig:
    """The config of an artifact for the tiny model."""
    hf_config = LlamaConfig.from_pretrained(model)
    values: dict[str, Any] = {
        "base_model": model.name,
        "architecture": "LlamaForCausalLM",
        "layers": LAYERS,
        "hidden_size": 64,
        "vocab_size": hf_config.vocab_size,
        "weights_fingerprint": served_fingerprint(model),
        "exit_points": EXIT_POINTS,
        "probe": "label-head",
        "candidates": "labels",
        "labels": tuple(
            Label(name=name, token_id=Fast.from_pretrained(model).encode(name)[0])
            for name in LABELS
        ),
        "classifier": "svm",
        "epsilon": 0.05,
        "delta": 0.1,
        "levels": (
            Level(epsilon=0.02, disagreement=0.0, risk=0.0, bound=0.01, layers_saved=0.1),
            Level(epsilon=0.05, disagreement=0.01, risk=0.01, bound=0.04, layers_saved=0.2),
        ),
    }
    return config_of({**values, **changes})


def config_of(flat: dict[str, Any]) -> ArtifactConfig:
    """The config of these fields, written as in version 1, with the features that go with them."""
    found = tagged(flat)
    features = {one.model_fields["kind"].default: one.feature_names for one in PROMISES}
    return ArtifactConfig.model_validate({"features": features[found["promise"]["kind"]], **found})


def tiny_tensors(
    config: ArtifactConfig,
    thresholds: Tensor | None = None,
    last_token_thresholds: Tensor | None = None,
) -> dict[str, Tensor]:
    """Random label heads whose score is the gap; by default all settle at the first exit."""
    whole, *last_token = config.parts("").values()
    tensors = _tensors_of_part(whole, thresholds, seed=1)
    for part in last_token:
        own = _tensors_of_part(part, last_token_thresholds, seed=2)
        tensors |= {f"{LAST_TOKEN}.{name}": tensor for name, tensor in own.items()}
    return tensors


def _tensors_of_part(
    config: ArtifactConfig, thresholds: Tensor | None, seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if thresholds is None:
        thresholds = torch.full((config.num_threshold_rows, len(config.exit_points)), -1.0)
    tensors = {"thresholds": thresholds}
    if config.candidates == "shortlist":
        tensors |= {"shortlist": torch.arange(3), "head_rows": torch.zeros(3, config.hidden_size)}
    for layer, read in zip(config.exit_points, config.probe_inputs, strict=True):
        width = config.hidden_size * (1 + config.is_pooled)
        if config.student is not None and read is ProbeInput.TEXT:
            width = config.student.hidden_size
        if layer in config.branches:
            width = 2 * BRANCH_WIDTH
            encoder = StateEncoder(config.hidden_size)
            for name, one in encoder.state_dict().items():
                if "norm" not in name:
                    one.normal_(std=one.shape[-1] ** -0.5, generator=generator)
                tensors[f"exit.{layer}.branch.{name}"] = one
        gap = [float(name in ("gap", "gate_distance")) for name in config.features]
        tensors[f"exit.{layer}.classifier"] = torch.tensor([*gap, 0.0])
        if "label-head" not in config.probe:
            continue
        rows = len(config.labels) + config.promise.reads_probabilities
        scale = 0.1 if config.is_pooled else 0.02  # normed states are shorter
        tensors[f"exit.{layer}.head_weight"] = scale * torch.randn(rows, width, generator=generator)
        tensors[f"exit.{layer}.head_bias"] = torch.zeros(rows)
    return tensors


def tiny_artifact(
    model: Path,
    directory: Path,
    thresholds: Tensor | None = None,
    last_token_thresholds: Tensor | None = None,
    **changes: Any,
) -> Path:
    """Write an artifact for the tiny model; `changes` are of its config."""
    from tests import student

    config = tiny_config(model, **changes)
    tensors = tiny_tensors(config, thresholds, last_token_thresholds)
    with_student: tuple[Any, ...] = ()
    if config.student is not None:
        with_student = student.encoder(), student.tokenizer()
    save_artifact(directory, config, tensors, {}, "card\n", *with_student)
    return directory
