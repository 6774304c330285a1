r"""Make a small reranker of a causal model: yes or no after a question and a passage.

    .venv/bin/python benchmarks/classifiers/train_reranker.py --model MODEL --data DIR --output DIR

It is trained on the training parts of BoolQ and SQuAD, each question with its own passage and some
that TF-IDF mistakes for it. The result is a one-column `*ForSequenceClassification` checkpoint,
with the chat template for the server's `--chat-template` beside it. It is a toy: it knows 1,300
questions.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.classifiers.passages import CHAT_TEMPLATE, Query, find_candidates
from benchmarks.common.lessons import minimise
from vllm_adainfer.offline.calibration.fit.net import mixed_precision

LEARNING_RATE = 8e-5
QUESTIONS = 4  # of a step
TEMPLATE_FILE = "rerank.jinja"


def main(
    model: Annotated[str, typer.Option()],
    data: Annotated[Path, typer.Option(help="Directory with boolq and squad.")],
    output: Annotated[Path, typer.Option()],
    negatives: Annotated[int, typer.Option(help="Wrong passages of a question.")] = 3,
    epochs: Annotated[int, typer.Option()] = 1,
) -> None:
    """Train, and write the checkpoint."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    yes, no = (tokenizer.encode(word)[0] for word in (" yes", " no"))
    rows = causal.get_output_embeddings().weight.detach()
    head = torch.nn.Parameter((rows[yes] - rows[no]).clone())
    causal.get_input_embeddings().requires_grad_(False)
    train(causal.model, head, tokenizer, find_candidates(data, "train", 20), negatives, epochs)
    save(causal, head, tokenizer, output)


def train(
    decoder: Any,
    head: torch.nn.Parameter,
    tokenizer: Any,
    queries: Sequence[Query],
    negatives: int,
    epochs: int,
) -> None:
    """Change `decoder` and `head` so that the right passage of a question scores highest."""
    parameters = [head, *(p for p in decoder.parameters() if p.requires_grad)]
    decoder.train()

    def loss(prompts: Sequence[str]) -> torch.Tensor:
        return loss_of(scores_of(decoder, head, tokenizer, prompts).view(-1, 1 + negatives))

    minimise(parameters, [*batches(queries, negatives, epochs)], loss, LEARNING_RATE)


def batches(queries: Sequence[Query], negatives: int, epochs: int) -> Iterator[list[str]]:
    """The prompts of each step: of each question the right passage, then wrong ones."""
    draw = np.random.default_rng(0)
    known = [query for query in queries if query.right is not None]
    for _ in range(epochs):
        order = draw.permutation(len(known))
        for start in range(0, len(order) - QUESTIONS + 1, QUESTIONS):
            prompts = []
            for place in order[start : start + QUESTIONS]:
                query = known[place]
                wrong = [n for n in range(len(query.documents)) if n != query.right]
                chosen = draw.choice(wrong, negatives, replace=False)
                prompts += [render(query.text, query.documents[n]) for n in (query.right, *chosen)]
            yield prompts


def render(query: str, document: str) -> str:
    """A pair in `CHAT_TEMPLATE`."""
    return f"Query: {query}\nPassage: {document}\nRelevant:"


def scores_of(
    decoder: Any, head: torch.Tensor, tokenizer: Any, prompts: Sequence[str]
) -> torch.Tensor:
    """The score of each prompt, read at its last token."""
    tokens = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="right")
    with mixed_precision():
        states = decoder(**tokens).last_hidden_state
    last = tokens["attention_mask"].sum(1) - 1
    return states[torch.arange(len(last)), last].float() @ head


def loss_of(scores: torch.Tensor) -> torch.Tensor:
    """The loss of `(questions, passages)`, the right one first: its rank, and each yes or no."""
    right = torch.zeros_like(scores)
    right[:, 0] = 1
    rank = torch.nn.functional.cross_entropy(scores, right)
    weight = torch.where(right > 0, float(scores.shape[1] - 1), 1.0)
    alone = torch.nn.functional.binary_cross_entropy_with_logits(scores, right, weight)
    return rank + alone / 2


def save(causal: Any, head: torch.Tensor, tokenizer: Any, output: Path) -> None:
    """Write decoder and head as a one-column classifier, in bfloat16."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(output, ignore_errors=True)
    causal.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    weights = load_file(output / "model.safetensors")
    weights.pop("lm_head.weight", None)
    weights["score.weight"] = head.detach().to(torch.bfloat16)[None]
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    (architecture,) = config["architectures"]
    config |= {
        "architectures": [architecture.replace("ForCausalLM", "ForSequenceClassification")],
        "id2label": {"0": "relevant"},
        "label2id": {"relevant": 0},
    }
    (output / "config.json").write_text(json.dumps(config, indent=2))
    (output / TEMPLATE_FILE).write_text(CHAT_TEMPLATE)


if __name__ == "__main__":
    typer.run(main)
