"""Train small models on this repository's text, so that exits have real decisions to make.

The task: given three lines of code, say whether they are from the package, its tests or its tools.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)
from transformers import PreTrainedTokenizerFast as Fast

Row = dict[str, str]
ROOT = Path(__file__).parents[2]
SOURCES = {"package": ["vllm_adainfer"], "tests": ["tests"], "tools": ["benchmarks", "kernels"]}
ASKS = "From:"  # precedes the label
TEMPLATE = f"{{text}}\n{ASKS}"
LINES = 3
LAYERS, HIDDEN, HEADS, VOCABULARY = 12, 256, 4, 2000
BATCH, EPOCHS, RATE = 32, 3, 1e-3
LABEL_WEIGHT = 10.0  # weight of a label token in the loss; other tokens weigh 1
FAMILIES = {
    "Llama": lambda **shape: LlamaForCausalLM(LlamaConfig(intermediate_size=3 * HIDDEN, **shape)),
    "OPT": lambda **shape: OPTForCausalLM(
        OPTConfig(ffn_dim=4 * HIDDEN, word_embed_proj_dim=HIDDEN, **shape)
    ),
    "Mixtral": lambda **shape: MixtralForCausalLM(
        MixtralConfig(
            intermediate_size=2 * HIDDEN, num_local_experts=8, num_key_value_heads=HEADS, **shape
        )
    ),
    # The last third of its layers shares the keys and values of earlier layers.
    "Gemma 4": lambda **shape: Gemma4ForCausalLM(
        Gemma4TextConfig(
            intermediate_size=3 * HIDDEN,
            num_key_value_heads=HEADS,
            head_dim=HIDDEN // HEADS,
            global_head_dim=HIDDEN // HEADS,
            layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
            num_kv_shared_layers=LAYERS // 3,
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=shape["vocab_size"],
            **shape,
        )
    ),
    # Three gated delta-net layers, then one attention layer, as in the released models.
    "Qwen 3.5": lambda **shape: Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            intermediate_size=3 * HIDDEN,
            num_key_value_heads=HEADS,
            head_dim=HIDDEN // HEADS,
            linear_num_key_heads=HEADS,
            linear_num_value_heads=HEADS,
            linear_key_head_dim=HIDDEN // HEADS,
            linear_value_head_dim=HIDDEN // HEADS,
            **shape,
        )
    ),
}


def snippets() -> list[Row]:
    """The same number of snippets from each source, without overlap, in random order."""
    by_source: dict[str, list[Row]] = {}
    for source, directories in SOURCES.items():
        rows = by_source[source] = []
        for directory in directories:
            for path in sorted((ROOT / directory).rglob("*.py")):
                lines = [line for line in path.read_text().splitlines() if line.strip()]
                for first in range(0, len(lines) - LINES + 1, LINES):
                    text = "\n".join(lines[first : first + LINES])
                    rows.append({"text": text, "label": source})
    generator = random.Random(0)
    count = min(map(len, by_source.values()))
    rows = [row for rows in by_source.values() for row in generator.sample(rows, count)]
    generator.shuffle(rows)
    return rows


def bpe_tokenizer(texts: Sequence[str]) -> Fast:
    """A byte-level BPE tokenizer trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Fast(tokenizer_object=tokenizer, pad_token="<pad>")


def with_shots(rows: Sequence[Row], known: Sequence[Row], shots: int) -> list[Row]:
    """`rows`, each preceded by `shots` answered rows of `known`."""
    generator = random.Random(0)
    drawn = [generator.sample(known, shots) for _ in rows]
    return [
        {**row, "text": "".join(f"{answered(shot)}\n\n" for shot in before) + row["text"]}
        for row, before in zip(rows, drawn, strict=True)
    ]


def answered(row: Row) -> str:
    """The prompt of a row, followed by its label."""
    return f"{TEMPLATE.format(**row)} {row['label']}"


def train(family: str, rows: Sequence[Row], directory: Path, shots: int = 0) -> Path:
    """Train a model of `family` from scratch on `rows`, and save it in bfloat16.

    Training texts hold one answered row each; with `shots`, a second set holds ``1 + shots``.
    """
    torch.manual_seed(0)
    tokenizer = bpe_tokenizer(list(map(answered, rows)))
    marker = torch.tensor(tokenizer(ASKS)["input_ids"])
    sizes = sorted({1, 1 + shots})
    model: Any = FAMILIES[family](
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    batches = [batch for size in sizes for _ in range(EPOCHS) for batch in drawn(rows, size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=len(batches))
    for texts in batches:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        loss = weighted_loss(model, batch["input_ids"], batch["attention_mask"], marker)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def drawn(rows: Sequence[Row], size: int) -> list[list[str]]:
    """Batches of texts of `size` rows each, over all rows in random order."""
    order = torch.randperm(len(rows))[: len(rows) // size * size].view(-1, size)
    texts = ["\n\n".join(answered(rows[i]) for i in text) for text in order.tolist()]
    in_batch = max(1, BATCH // size)
    return [texts[first : first + in_batch] for first in range(0, len(texts), in_batch)]


def weighted_loss(model: Any, ids: Tensor, mask: Tensor, marker: Tensor) -> Tensor:
    """Weighted cross entropy of next tokens; labels, the tokens after `marker`, weigh more."""
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(len(ids), -1)
    weights = mask[:, 1:].float()
    windows = ids.unfold(1, len(marker), 1)[:, :-1]
    labels = (windows == marker).all(-1)
    weights[:, len(marker) - 1 :][labels] = LABEL_WEIGHT
    return (losses * weights).sum() / weights.sum()
