"""What the commands do, one module per command; each is also an ordinary Python function."""
