"""A reward whose LLM runs on a server."""
