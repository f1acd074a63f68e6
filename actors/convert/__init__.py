"""Checkpoint conversions: files in, files out. Nothing here serves requests."""
