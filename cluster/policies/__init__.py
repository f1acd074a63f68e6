"""Which expert is evicted, and which is fetched ahead: pure, the same live and in replay."""
