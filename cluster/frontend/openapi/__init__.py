"""The description of the HTTP API, and its page."""
