"""What a policy promises about its answers, one file for each kind. Never imports vLLM."""
