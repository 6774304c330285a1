"""What a person runs from the command line."""
