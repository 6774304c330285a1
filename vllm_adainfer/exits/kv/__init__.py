"""What becomes of the keys and values of layers that a row skips."""
