"""What the commands do, one module a command; each is also an ordinary function for Python."""
