"""If the process in front of an engine is killed, the engine and its worker live on.

Needs vLLM 0.32 on a CPU, no model and no network.
Exits with 1 if the defect is there, with 0 if not. Ends all that it started, and nothing else.
"""
# ruff: noqa: T201

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil  # one of vLLM's own requirements

os.environ |= {
    "VLLM_PLUGINS": "",  # load none
    "HF_HUB_OFFLINE": "1",
}
READY = "the engine is ready"
WAIT_SECONDS = 30  # for the engine to notice


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


def front(model: str) -> None:
    """Start an engine, answer one request, and wait to be killed."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=256 << 20,
    )
    engine.generate(["w1 w2 w3"], SamplingParams(max_tokens=1), use_tqdm=False)
    print(READY, flush=True)
    sys.stdin.read()


def main() -> int:
    """Kill the process in front of an engine, and look for what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that `finally` runs
    started: list[psutil.Process] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, tiny_model(Path(folder))]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            if not any(READY in line for line in process.stdout or ()):
                raise RuntimeError("the engine did not start")
            started = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            _, alive = psutil.wait_procs(started, timeout=WAIT_SECONDS)
            left = [one for one in alive if one.name().startswith("VLLM::")]
            for one in left:
                resident = one.memory_info().rss >> 20
                print(f"alive {WAIT_SECONDS} s later: {one.name()}, {resident} MiB resident")
        finally:
            if process.poll() is None:
                started = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for one in started:
                if one.is_running():
                    one.kill()
            psutil.wait_procs(started, timeout=WAIT_SECONDS)
    if not left:
        sys.stderr.write(process.stdout.read() if process.stdout else "")  # why they have ended
        print("not reproduced: all processes of the engine have ended")
        return 0
    print(f"reproduced: {len(left)} processes of vLLM outlived the one in front of them")
    return 1


if __name__ == "__main__":
    if sys.argv[1:]:
        front(sys.argv[1])
    else:
        sys.exit(main())
