"""The promises about answers, one file for each. Never imports vLLM."""
