"""What answers to a grammar looked like so far, and how much of the next one to draft."""
