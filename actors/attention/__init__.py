"""An attention worker: what it consists of, and what it says of itself."""
