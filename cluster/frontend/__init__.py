"""The edge: OpenAI requests and prompts in, text out. Knows HTTP and text; never computes and never starts Ray."""
