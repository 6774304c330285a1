"""Keys and values of the layers that a row skips."""
