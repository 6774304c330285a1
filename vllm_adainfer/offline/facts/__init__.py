"""The facts about an artifact, and facts as text and as Markdown."""
