"""Config time: what the engine switch selects, and what it refuses."""
