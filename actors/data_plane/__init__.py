"""Carries token rows from attention workers to expert hosts, and their partial sums back."""
