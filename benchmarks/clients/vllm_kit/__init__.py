"""What makes vLLM's own entry-point tests ask Moesaic: a stand-in server, the changes of text, what is left out."""
