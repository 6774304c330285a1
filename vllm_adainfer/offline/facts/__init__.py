"""What is said of an artifact, as facts, and facts as text and as Markdown."""
