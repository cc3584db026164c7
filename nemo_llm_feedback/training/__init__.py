"""Training from feedback: objectives, the training step, what happens before the first step, guards and logs."""
