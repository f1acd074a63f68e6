"""What a step decides while it runs. Pure."""
