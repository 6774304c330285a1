"""On a CPU, code that was compiled ahead of time is saved, but never loaded.

Needs vLLM 0.32 on a CPU and a C++ compiler, no model and no network.
Exits with 1 if the defect is there, with 0 if not.
"""
# ruff: noqa: T201

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "VLLM_PLUGINS": "",  # load none
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that this process sees the counters
    "HF_HUB_OFFLINE": "1",
}
COUNTERS = "num_aot_compiles", "num_aot_artifacts_saved", "num_aot_artifacts_loaded"


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


def start(model: str) -> None:
    """Start an engine, and print what it has compiled, saved and loaded."""
    from vllm import LLM
    from vllm.compilation.counter import compilation_counter

    LLM(model, dtype="float32", max_model_len=128, kv_cache_memory_bytes=64 << 20)
    print(json.dumps({name: getattr(compilation_counter, name) for name in COUNTERS}))


def main() -> int:
    """Start an engine twice, in processes of their own, with one empty cache for both."""
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder, "model"))
        environment = {
            **os.environ,
            "VLLM_CACHE_ROOT": str(Path(folder, "cache")),
            "VLLM_USE_AOT_COMPILE": "1",  # the default with this torch
        }
        for name in "first", "second":
            done = subprocess.run(
                [sys.executable, __file__, model],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            lines = done.stdout.splitlines()
            if done.returncode:
                sys.stderr.write(done.stdout)
                raise RuntimeError(f"the {name} engine did not start")
            counts.append(json.loads(next(line for line in lines[::-1] if line.startswith("{"))))
            print(f"{name} start: {counts[-1]}")
            for line in lines:
                if "due to a load failure" in line:
                    print(f"{name} start: {line.replace(folder, 'FOLDER')}")
    saved, loaded = counts[0]["num_aot_artifacts_saved"], counts[1]["num_aot_artifacts_loaded"]
    again = counts[1]["num_aot_compiles"]
    if not saved:
        raise RuntimeError("the first start saved nothing: this torch compiles in another way")
    if not again:
        print(f"not reproduced: the second start loaded {loaded} of {saved} that the first saved")
        return 0
    print(f"reproduced: of {saved} saved, the second start loaded {loaded} and compiled {again}")
    return 1


if __name__ == "__main__":
    if sys.argv[1:]:
        start(sys.argv[1])
    else:
        sys.exit(main())
