"""The batch that a step runs: its rows, their states, and what runs them."""
