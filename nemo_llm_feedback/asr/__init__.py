"""The NeMo model seen from outside: heads, exact likelihood, sampling, the frozen reference, checkpoints."""
