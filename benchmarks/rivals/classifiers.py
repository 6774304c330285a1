"""Small classifiers that learn the model's answers from the text, to answer in its place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from vllm_adainfer.arrays import Floats, Ints

SHAD0W = "shad0wllm==0.4.0"
INVERSE_REGULARISATION = 10.0
TEXTS = 32  # that an encoder reads at once
MOST_TOKENS = 256  # that it reads of a text


class Classifier(Protocol):
    """A classifier of texts."""

    def fit(self, texts: Sequence[str], answers: Ints) -> None:
        """Learn the model's `answers` [texts], token ids."""

    def answer(self, texts: Sequence[str]) -> tuple[Ints, Floats]:
        """An answer for each text, and how sure it is of it, 0 to 1."""


class Words:
    """TF-IDF of words and pairs of words, and logistic regression."""

    def __init__(self) -> None:
        self._words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        self._model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000)

    def fit(self, texts: Sequence[str], answers: Ints) -> None:
        """See `Classifier`."""
        self._model.fit(self._words.fit_transform(texts), answers)

    def answer(self, texts: Sequence[str]) -> tuple[Ints, Floats]:
        """See `Classifier`."""
        return _likeliest(self._model, self._words.transform(texts))


class Embeddings:
    """The embeddings of an encoder, which stays as it is, and logistic regression.

    An embedding is the mean of a text's last states, normed.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._encoder = AutoModel.from_pretrained(directory, dtype=torch.bfloat16).eval()
        self._model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000)

    def fit(self, texts: Sequence[str], answers: Ints) -> None:
        """See `Classifier`."""
        self._model.fit(self._embed(texts), answers)

    def answer(self, texts: Sequence[str]) -> tuple[Ints, Floats]:
        """See `Classifier`."""
        return _likeliest(self._model, self._embed(texts))

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Floats:
        embeddings = np.empty((len(texts), self._encoder.config.hidden_size))
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), TEXTS):
            places = order[start : start + TEXTS]
            inputs = self._tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=MOST_TOKENS,
                return_tensors="pt",
            )
            states = self._encoder(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(1) / mask.sum(1)
            embeddings[places] = torch.nn.functional.normalize(means).numpy()
        return embeddings


class Shad0wTable:
    """The table of `SHAD0W`, and its own confidence; see `compile_schema` there."""

    def __init__(self, directory: Path) -> None:
        if not (directory / "shad0w").is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target"]
            subprocess.run([*pip, str(directory), SHAD0W], check=True)
        if str(directory) not in sys.path:
            sys.path.append(str(directory))
        self._options: Ints = np.empty(0, dtype=np.int64)
        self._table: Any = None

    def fit(self, texts: Sequence[str], answers: Ints) -> None:
        """See `Classifier`."""
        from shad0w.compiler.distill import compile_schema

        self._options, columns = np.unique(answers, return_inverse=True)
        names = [str(option) for option in self._options]
        self._table = compile_schema(list(texts), columns, names)

    def answer(self, texts: Sequence[str]) -> tuple[Ints, Floats]:
        """See `Classifier`."""
        probabilities, sure, _ = self._table.predict(list(texts))
        return self._options[probabilities.argmax(axis=1)], np.asarray(sure, dtype=np.float64)


def _likeliest(model: LogisticRegression, features: Any) -> tuple[Ints, Floats]:
    probabilities = model.predict_proba(features)
    return model.classes_[probabilities.argmax(axis=1)], probabilities.max(axis=1)
