"""``python -m vllm_adainfer.cli``."""

from vllm_adainfer.cli import app

if __name__ == "__main__":
    app()
