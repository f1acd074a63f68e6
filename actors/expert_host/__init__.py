"""An expert host: handler, batching pool, device owner (hivemind's division of an expert server)."""
