"""A request's life between its text and its tokens, for every API."""
