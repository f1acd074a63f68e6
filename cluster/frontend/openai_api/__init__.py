"""The OpenAI API: schemas, answers, routes."""
