"""Run the prompts at full depth, and record hidden states."""
