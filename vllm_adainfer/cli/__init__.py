"""The command line ``vllm-adainfer``.

calibrate         fit a policy on your prompts and certify its bound
evaluate          measure stock vLLM and vllm-adainfer side by side
inspect           summarise an artifact
push              upload an artifact to the Hugging Face hub
doctor            check the installation, an artifact and a model
explain           show what a policy sees of one prompt, and where it exits
audit             sum up where the answers of a server came from
kinds             show which kinds of requests a server gets, and how it serves each
serve             run vLLM's server with policies
bench             run vLLM's benchmarks with policies
run-batch         run vLLM's batch runner with policies
autopilot         fit policies for a server that calibrates itself
demo              calibrate and evaluate on a small real model
fetch-demo-model  write that model as a safetensors checkpoint
"""

from vllm_adainfer.cli import auto, calibrate, check, demo, evaluate, launch
from vllm_adainfer.cli.app import app

__all__ = ["app", "auto", "calibrate", "check", "demo", "evaluate", "launch"]
