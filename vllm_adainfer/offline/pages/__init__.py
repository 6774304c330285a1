"""Self-contained HTML pages about an artifact and its evaluation."""
