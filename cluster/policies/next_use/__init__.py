"""When each expert is used next: the estimate that Moesaic's policies share."""
