"""The HTTP application: what is common to all routes, and routes that are not OpenAI's."""
