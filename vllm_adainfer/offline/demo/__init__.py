"""Demo: a small real model, prompts written for this project, and one run of it all."""
