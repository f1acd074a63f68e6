"""The parts of an expert host: handler, batching pool, device owner (hivemind's division of an expert server)."""
