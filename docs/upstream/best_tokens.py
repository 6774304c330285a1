"""One request with ``logprob_token_ids`` takes the best tokens of another one's ``logprobs=3``.

Needs vLLM 0.32 on a CPU, no model and no network.
Exits with 1 if the defect is there, with 0 if not.
"""
# ruff: noqa: T201

from __future__ import annotations

import os
import sys
import tempfile
from math import isfinite
from pathlib import Path

os.environ |= {
    "VLLM_PLUGINS": "",  # load none
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the default on a CPU
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


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
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main() -> int:
    """Ask for three best tokens, alone and then beside a request with ids of its own."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        engine = LLM(
            tiny_model(Path(folder)),
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            kv_cache_memory_bytes=64 << 20,
        )
        best = SamplingParams(temperature=0, max_tokens=1, logprobs=3)
        chosen = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=[5, 9])
        prompts = ["w1 w2 w3", "w4 w5 w6"]
        [alone] = engine.generate(prompts[:1], best)
        beside, _ = engine.generate(prompts, [best, chosen])

    found = []
    for name, answer in ("alone", alone), ("beside", beside):
        [tokens] = answer.outputs[0].logprobs
        found.append({token: round(entry.logprob, 3) for token, entry in tokens.items()})
        print(f"{name}: {found[-1]}")
    lost = {token for token in found[0] if not isfinite(found[1].get(token, float("-inf")))}
    if not lost:
        print("not reproduced: the request has its three best tokens in both steps")
        return 0
    print(f"reproduced: {len(lost)} of the best tokens are missing beside the other request")
    return 1


if __name__ == "__main__":
    sys.exit(main())
