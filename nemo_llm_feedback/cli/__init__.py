"""The command ``nemo-llm-feedback``: faces in ``commands``, work in ``jobs``."""
