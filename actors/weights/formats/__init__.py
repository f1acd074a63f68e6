"""Weight formats: what an expert's slot holds, how many bytes that is, and how to compute with it."""
