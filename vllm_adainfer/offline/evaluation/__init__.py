"""Evaluation: stock vLLM and vllm-adainfer side by side."""
