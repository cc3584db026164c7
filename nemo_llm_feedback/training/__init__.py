"""What happens around the training step: guards, selection of weights, validation, logs."""
