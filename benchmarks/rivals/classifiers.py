"""Small classifiers that learn the model's answers from the text, to answer in its place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from vllm_adainfer.arrays import Floats, Ints

SHAD0W = "shad0wllm==0.4.0"
INVERSE_REGULARISATION = 10.0
TEXTS = 32  # that an encoder reads at once
MOST_TOKENS = 256  # that it reads of a text

Answer = Callable[[Sequence[str]], tuple[Ints, Floats]]
"""An answer for each text, and how sure a classifier is of it, 0 to 1."""
Fit = Callable[[Sequence[str], Ints], Answer]
"""Learns the model's answers [texts], token ids."""


def words() -> Fit:
    """TF-IDF of words and pairs of words, and logistic regression."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return _regression(vectors.fit_transform, vectors.transform)


def embeddings(directory: Path) -> Fit:
    """The embeddings of an encoder, which stays as it is, and logistic regression.

    An embedding is the mean of a text's last states, normed.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoder = AutoModel.from_pretrained(directory, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Floats:
        found = np.empty((len(texts), encoder.config.hidden_size))
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), TEXTS):
            places = order[start : start + TEXTS]
            inputs = tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=MOST_TOKENS,
                return_tensors="pt",
            )
            states = encoder(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(1) / mask.sum(1)
            found[places] = torch.nn.functional.normalize(means).numpy()
        return found

    return _regression(embed, embed)


def shad0w_table(directory: Path) -> Fit:
    """The table of `SHAD0W`, and its own confidence; see `compile_schema` there."""
    if not (directory / "shad0w").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target"]
        subprocess.run([*pip, str(directory), SHAD0W], check=True)
    if str(directory) not in sys.path:
        sys.path.append(str(directory))

    def fit(texts: Sequence[str], answers: Ints) -> Answer:
        from shad0w.compiler.distill import compile_schema

        options, columns = np.unique(answers, return_inverse=True)
        table = compile_schema(list(texts), columns, [str(option) for option in options])

        def answer(some: Sequence[str]) -> tuple[Ints, Floats]:
            probabilities, sure, _ = table.predict(list(some))
            return options[probabilities.argmax(axis=1)], np.asarray(sure, dtype=np.float64)

        return answer

    return fit


def _regression(fitted: Callable[..., Any], read: Callable[[Sequence[str]], Any]) -> Fit:
    """Logistic regression on the features of texts: those to fit on, and others."""

    def fit(texts: Sequence[str], answers: Ints) -> Answer:
        model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000)
        model.fit(fitted(texts), answers)

        def answer(some: Sequence[str]) -> tuple[Ints, Floats]:
            probabilities = model.predict_proba(read(some))
            return model.classes_[probabilities.argmax(axis=1)], probabilities.max(axis=1)

        return answer

    return fit
