"""The command line ``nemo-llm-feedback``: ``commands`` has the flags, ``jobs`` does the work."""
