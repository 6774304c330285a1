"""On a CPU, one request with a ``seed`` and a prompt of several chunks stops the engine.

Needs vLLM 0.32 on a CPU, no model and no network.
Exits with 1 if the defect is there, with 0 if not.
"""
# ruff: noqa: T201

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "VLLM_PLUGINS": "",  # load none
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the default on a CPU
    "HF_HUB_OFFLINE": "1",
}
CHUNK = 32  # tokens of a step


def tiny_model(folder: Path) -> str:
    """Write a random Llama of two layers, and a tokenizer of 64 words, into `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(64)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main() -> int:
    """Ask without a seed, with a seed in one chunk, and with both a seed and three chunks."""
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.exceptions import EngineDeadError

    with tempfile.TemporaryDirectory() as folder:
        engine = LLM(
            tiny_model(Path(folder)),
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=4,
            kv_cache_memory_bytes=64 << 20,
        )

        def answered(tokens: int, seed: int | None) -> bool:
            params = SamplingParams(temperature=1, seed=seed, max_tokens=1)
            prompt = {"prompt_token_ids": [1 + (seed or 0)] * tokens}
            try:
                [answer] = engine.generate([prompt], params)
            except EngineDeadError:
                return False
            return len(answer.outputs[0].token_ids) == 1

        cases = {
            "three chunks, no seed": (3 * CHUNK, None),
            "one chunk, a seed": (CHUNK // 2, 5),
            "three chunks, a seed": (3 * CHUNK, 5),
            "then one chunk, no seed": (CHUNK // 2, None),
        }
        outcome = {name: answered(*case) for name, case in cases.items()}
    for name, good in outcome.items():
        print(f"{name}: {'answered' if good else 'EngineDeadError'}")
    if all(outcome.values()):
        print("not reproduced: all four requests were answered")
        return 0
    if list(outcome.values()) == [True, True, False, False]:
        print("reproduced: the request with a seed and three chunks stopped the engine")
        return 1
    raise RuntimeError("another request failed: this is not the defect that the script is about")


if __name__ == "__main__":
    sys.exit(main())
