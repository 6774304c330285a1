"""The exit loop: segments, decisions, and the requests that leave between them."""
