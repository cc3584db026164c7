"""Lightning callbacks of a run: logs, held-out metrics, guards, early stopping, learning-rate search."""
