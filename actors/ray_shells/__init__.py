"""Everything that Ray and Ray Serve see: actors, deployments, clients. The only room that imports Ray."""
