"""Where hypotheses come from and how they are kept."""
