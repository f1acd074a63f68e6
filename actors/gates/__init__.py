"""What routers chose: read once, for policies, statistics and traces."""
