"""A tiny model whose tokenizer writes a word in several ways, one of them canonical."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from tests.families import SHAPE

END = "<end>"
# Choices for requests: prefixes of one another, with shared tokens, accents and escapes among them.
SETS = [
    ["positive", "negative"],
    ["positive", "negative", "neutral"],
    ["yes", "yes, but", "no"],
    ["posi", "position", "positive", "pose"],
    ["a film", "a plot", "the film", "the plot"],
    ["caf\u00e9", "caffeine", "\u00e9t\u00e9"],
    ["x"],
    ['"quoted"', "back\\slash", "new\nline"],
]


def byte_tokenizer() -> Fast:
    """Bytes, and some merged: several ways to write a word, one of them canonical."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("p", "o"), ("po", "s"), ("i", "t"), ("it", "i"), ("v", "e"), ("n", "e"), ("y", "e")]
    merges += [("ye", "s"), ("n", "o"), ("a", "\u0120"), ("pos", "iti"), ("positi", "ve")]
    tokens = [*alphabet, *(first + second for first, second in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = Fast(tokenizer_object=tokenizer, eos_token=AddedToken(END, special=True))
    return fast


def save_byte_model(directory: Path) -> Path:
    """Write it, with random weights; the directory."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**shape)
    config.architectures = ["LlamaForCausalLM"]
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
