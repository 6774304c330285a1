"""Settings of the engine switch and of a request."""
