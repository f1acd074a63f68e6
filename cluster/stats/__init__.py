"""Aggregated activation statistics: where they are kept and what happens when that place is away."""
