"""A reward whose LLM runs on a vLLM server."""
