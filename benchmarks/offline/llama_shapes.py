"""Llama checkpoints without weights (config and tokenizer), for ``load_format=dummy``."""

from __future__ import annotations

from pathlib import Path

# Of Llama 3.2 1B, Llama 3.1 8B and 70B.
SHAPES = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
VOCABULARY = 128_256


def write_shape(name: str, parent: Path) -> Path:
    """Write a checkpoint with the shape `name` below `parent`; returns its directory."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    directory = parent / name
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        **SHAPES[name],
    )
    config.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.save_pretrained(directory)
    return directory
