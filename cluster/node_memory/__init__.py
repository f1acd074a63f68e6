"""Which memory of a node is free, and what its processes have promised themselves of it."""
