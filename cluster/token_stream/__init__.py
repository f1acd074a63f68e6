"""Tokens on their way from an attention worker to a front end: frames, and both ends."""
