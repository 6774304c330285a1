"""A tiny random student: an encoder of one layer that reads the words of the tiny model."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from tests.tiny import word_tokenizer
from vllm_adainfer.artifact.artifact import Encoder
from vllm_adainfer.artifact.fields import SharedTokens, Student
from vllm_adainfer.policy.own_text import TextReader, text_reader

WIDTH = 16
LONGEST = 24  # tokens that it reads
SHARED = SharedTokens(start=(1, 2))  # that prompts begin with


@cache
def tokenizer() -> str:
    """The JSON of its tokenizer."""
    return str(word_tokenizer().backend_tokenizer.to_str())


def bert(seed: int = 3) -> BertModel:
    """Its encoder."""
    torch.manual_seed(seed)
    size = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
    return BertModel(
        BertConfig(
            vocab_size=len(word_tokenizer()),
            num_hidden_layers=1,
            max_position_embeddings=64,
            initializer_range=0.5,
            **size,
        )
    ).eval()


def encoder() -> Encoder:
    """The same as an artifact has it."""
    model = bert()
    return Encoder(model.config.to_dict(), dict(model.state_dict()))


def described(shared: SharedTokens = SHARED, most_tokens: int = LONGEST, **changes: Any) -> Student:
    """What an artifact says of it."""
    return Student(
        name="tiny-bert",
        license="apache-2.0",
        hidden_size=WIDTH,
        shared_start=len(shared.start),
        shared_end=len(shared.end),
        most_tokens=most_tokens,
        tokenizer=hashlib.sha256(tokenizer().encode()).hexdigest(),
        **changes,
    )


def asked_with(shared: SharedTokens = SHARED, most_tokens: int = LONGEST) -> dict[str, Any]:
    """The fields of a config that has it."""
    return {"student": described(shared, most_tokens), "shared": shared}


def reader(student: Student, shared: SharedTokens = SHARED) -> TextReader:
    """Reads prompts of the tiny model for it."""
    return text_reader(word_tokenizer().decode, student, shared, tokenizer())


def save_bert(directory: Path, **settings: Any) -> Path:
    """Write the encoder and its tokenizer, as transformers saves them; `settings` of saving."""
    bert().save_pretrained(directory, **settings)
    word_tokenizer().save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return directory
