"""The encoder that a student is trained from, in a directory or on the hub, and what it reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.fields import MOST_STUDENT_TOKENS, SharedTokens, Student
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.policy.own_text import decoding_digest, text_reader

TOKENIZER = "tokenizer.json"
FILES = ("config.json", TOKENIZER, "tokenizer_config.json", "*.safetensors*", "README.md")
FEWEST_TOKENS = 8  # below, an encoder reads no sentence


@dataclass(frozen=True)
class StudentBase:
    """An encoder to train, and the prompts as it reads them.

    Attributes:
        described: what an artifact says of the student.
        model: the encoder of transformers, fp32.
        tokenizer: the JSON of its tokenizer.
        texts: [prompts], what it reads of each, in its own tokens; empty where it is not asked.

    """

    described: Student
    model: Any
    tokenizer: str
    texts: Sequence[Sequence[int]]


def load_student_base(
    source: str, examples: Sequence[Example], model_tokenizer: Any, shared: SharedTokens
) -> StudentBase:
    """Load an encoder, a directory or hub id, and read the prompts with its tokenizer.

    It reads what lies between the tokens that are `shared`, decoded by `model_tokenizer`. An
    AdaInferError if there is no such encoder, or it cannot be a student.
    """
    from transformers import AutoModel

    directory, revision = _located(source)
    try:
        # Code that comes with a model is never run, and nothing is unpickled.
        model = AutoModel.from_pretrained(
            directory, dtype="float32", trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise AdaInferError(
            f"--student {source} is not an encoder that transformers loads from safetensors "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
    if model.config.is_encoder_decoder:
        raise AdaInferError(
            f"--student {source} is an encoder-decoder model: give an encoder, such as MiniLM"
        )
    path = directory / TOKENIZER
    if not path.is_file():
        raise AdaInferError(
            f"--student {source} has no {TOKENIZER}: save its tokenizer with transformers, as a "
            "fast one"
        )
    tokenizer = path.read_text(encoding="utf-8")
    described = Student(
        name=Path(source).name if Path(source).is_dir() else source,
        revision=revision,
        license=_license(directory),
        hidden_size=model.config.hidden_size,
        shared_start=len(shared.start),
        shared_end=len(shared.end),
        most_tokens=_most_tokens(source, directory, model.config),
        tokenizer=hashlib.sha256(tokenizer.encode()).hexdigest(),
        decoding=decoding_digest(model_tokenizer),
    )
    decode = partial(model_tokenizer.decode, skip_special_tokens=True)
    read = text_reader(decode, described, shared, tokenizer)
    texts = [read(example.token_ids) for example in examples]
    if not any(texts):
        raise AdaInferError(
            f"--student {source} has nothing to read: the prompts have no text of their own "
            f"between the {len(shared.start)} tokens that all of them begin with and the "
            f"{len(shared.end)} that all end with"
        )
    return StudentBase(described, model, tokenizer, texts)


def _located(source: str) -> tuple[Path, str | None]:
    """The directory of an encoder, and its commit on the hub; None for a directory."""
    if Path(source).is_dir():
        return Path(source), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        directory = Path(snapshot_download(source, allow_patterns=list(FILES)))
    except (OSError, HFValidationError) as error:
        raise AdaInferError(
            f"--student {source} is neither a directory nor a hub id that can be fetched "
            f"({type(error).__name__})"
        ) from None
    return directory, directory.name


def _license(directory: Path) -> str | None:
    """The license that a model card names; None if it names none."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(directory / "README.md").data.license
    except (OSError, ValueError):
        return None
    return None if found is None else str(found)


def _most_tokens(source: str, directory: Path, config: Any) -> int:
    """How many tokens of a text the encoder reads.

    Some encoders begin to count positions after that of the padding (RoBERTa), so where the
    tokenizer states a limit, that counts.
    """
    from transformers import AutoTokenizer

    stated = AutoTokenizer.from_pretrained(directory).model_max_length
    places = getattr(config, "max_position_embeddings", None) or MOST_STUDENT_TOKENS
    most = int(min(stated, places, MOST_STUDENT_TOKENS))
    if most < FEWEST_TOKENS:
        raise AdaInferError(
            f"--student {source} reads at most {most} tokens, which is no sentence: give another "
            "encoder"
        )
    return most
