"""How many workers and hosts there should be, and on which nodes."""
