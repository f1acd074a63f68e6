"""Load generation: when requests come, what they say, sending them, and what came of it."""
